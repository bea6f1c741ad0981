"""The demo runs all stages, and transformers loads its release."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllama import cli, demo
from tinyllama.prepare.corpus import CorpusSizes
from tinyllama.release import engines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CRASHING = Path(__file__).parents[1] / "release/crashing_engine.py"
SHORT = {
    "train.tokens": "20K",
    "train.batch_sequences": "8",
    "train.micro_batch_sequences": "8",
    "train.compile": "false",
    "train.validate_every_steps": "5",
    "train.validation_sequences": "64",
    "checkpoint.every_steps": "5",
    "release.limit": "8",
}
COMMAND = ["demo", *(word for field, value in SHORT.items() for word in (f"--{field}", value))]


def test_demo_release_loads_in_transformers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    embedded_corpora: tuple[Path, Path, CorpusSizes],
) -> None:
    corpus, _, report = embedded_corpora

    def link_corpus(folder: Path) -> CorpusSizes:
        shutil.copytree(corpus, folder, copy_function=os.link)
        return report

    monkeypatch.setattr(demo, "write_corpus", link_corpus)  # tests/prepare/test_corpus.py tests writing it
    monkeypatch.chdir(tmp_path)
    status = cli.main(COMMAND)
    output, errors = capsys.readouterr()
    assert status == 0, errors
    for stage in range(1, 9):
        assert f"\n{stage}/8 " in output
    assert "step-00000010/gguf/demo-Q4_K_M.gguf: " in output
    assert "FAIL" not in output
    measured = re.search(r"validation: ([\d.]+) bits per byte; gzip -9 on the same documents: ([\d.]+)", output)
    assert measured is not None
    assert all(0 < float(number) < 8 for number in measured.groups())
    assert "first 8 of 10042 items" in output
    assert "excluded: RedPajamaGithub" in output

    release = tmp_path / "runs/demo/releases/step-00000010"
    model = AutoModelForCausalLM.from_pretrained(release / "huggingface")
    tokenizer = AutoTokenizer.from_pretrained(release / "huggingface")
    output = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=5)
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith("def main(")
    card = (release / "huggingface/README.md").read_text()
    assert "first 8 of 10042 items" in card
    assert "Pythia-1B" in card
    assert json.loads((release / "evaluation.json").read_text())["rows"]["hellaswag"]["items"] == 8

    losses = (tmp_path / "runs/demo/metrics.jsonl").read_bytes()
    # Engines that crash: the same command fails, names them and repeats no other stage.
    monkeypatch.setenv("ENGINES", engines.__file__)
    monkeypatch.setattr(engines, "__file__", str(CRASHING))
    monkeypatch.setenv("CRASH", f"any={int(signal.SIGSEGV)}")
    assert cli.main(COMMAND) == 1
    assert (tmp_path / "runs/demo/metrics.jsonl").read_bytes() == losses
    out = capsys.readouterr().out
    assert measured[0] in out
    assert "\nDone" not in out
    last = out.splitlines()[-1]
    assert "gguf Q8_0 (loads and runs), gguf Q4_K_M (loads and runs)" in last
