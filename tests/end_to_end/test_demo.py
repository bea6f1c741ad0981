"""The demo goes the whole way on real text, and its release is a model to others' software."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllama import cli
from tinyllama.release import engines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CRASHING = Path(__file__).parents[1] / "release/crashing_engine.py"
SHORT = {
    "train.tokens": "40K",
    "train.batch_sequences": "8",
    "train.micro_batch_sequences": "8",
    "train.compile": "false",
    "train.validate_every_steps": "10",
    "train.validation_sequences": "64",
    "checkpoint.every_steps": "10",
    "release.limit": "20",
}
COMMAND = ["demo", *(word for field, value in SHORT.items() for word in (f"--{field}", value))]


def test_the_demo_makes_a_release_that_transformers_loads_and_says_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "tinyllama", *COMMAND]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    for stage in range(1, 9):
        assert f"\n{stage}/8 " in said
    assert "step-00000020/gguf/demo-Q4_K_M.gguf: " in said
    assert "FAIL" not in said
    measured = re.search(r"validation: ([\d.]+) bits per byte; gzip -9 on the same documents: ([\d.]+)", said)
    assert measured is not None
    assert all(0 < float(number) < 8 for number in measured.groups())
    assert "first 20 of 10042 items" in said
    assert "excluded: RedPajamaGithub" in said

    release = tmp_path / "runs/demo/releases/step-00000020"
    model = AutoModelForCausalLM.from_pretrained(release / "huggingface")
    tokenizer = AutoTokenizer.from_pretrained(release / "huggingface")
    output = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=5)
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith("def main(")
    card = (release / "huggingface/README.md").read_text()
    assert "first 20 of 10042 items" in card
    assert "Pythia-1B" in card
    assert json.loads((release / "evaluation.json").read_text())["rows"]["hellaswag"]["items"] == 20

    losses = (tmp_path / "runs/demo/metrics.jsonl").read_bytes()
    monkeypatch.chdir(tmp_path)
    # the engines' processes crash at once: the same command again fails by their names, and makes nothing again
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
