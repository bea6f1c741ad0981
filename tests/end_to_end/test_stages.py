"""`run` and `demo` do all stages: a killed `run` resumes, and transformers loads the release of the demo."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tests.conftest import python_sources, small_recipe
from tests.faults.commands import kill_at_write, run_command
from tests.prepare.raw import COMPRESSIONS, lines, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllama import cli, hardware, stages
from tinyllama.prepare.corpus import CorpusSizes
from tinyllama.release import engines
from tinyllama.runs.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CRASHING = Path(__file__).parents[1] / "release/crashing_engine.py"
SMALL_DEMO = {
    "vocab_size": "600",
    "model": "{dim: 64, layers: 2, heads: 4, kv_heads: 2, ffn_dim: 128, context_length: 256, tie_embeddings: true}",
    "train.tokens": "20K",
    "train.batch_sequences": "8",
    "train.micro_batch_sequences": "8",
    "train.compile": "false",
    "train.validate_every_steps": "5",
    "train.validation_sequences": "64",
    "checkpoint.every_steps": "5",
    "release.formats": "[huggingface]",
    "release.limit": "8",
}


@pytest.fixture(autouse=True)
def no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not measure the CPU's peak after each checkpoint, which would take longer than the runs."""
    monkeypatch.setattr(hardware, "peak_flops", lambda device, precision: None)


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

    monkeypatch.setattr(stages, "write_corpus", link_corpus)  # tests/prepare/test_corpus.py tests writing it
    monkeypatch.chdir(tmp_path)
    status = cli.main(["demo", *(word for field, value in SMALL_DEMO.items() for word in (f"--{field}", value))])
    output, errors = capsys.readouterr()
    assert status == 0, errors
    stages_run = re.findall(r"^(\d)/(\d) ", output, re.MULTILINE)
    assert len(stages_run) > 1
    assert stages_run == [(str(number), str(len(stages_run))) for number in range(1, len(stages_run) + 1)]
    assert "FAIL" not in output
    assert "first 8 of 10042 items" in output
    assert "excluded: RedPajamaGithub" in output
    assert "> def main(" in output

    release = tmp_path / "runs/demo/releases/step-00000010"
    model = AutoModelForCausalLM.from_pretrained(release / "huggingface")
    tokenizer = AutoTokenizer.from_pretrained(release / "huggingface")
    output = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=5)
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith("def main(")
    card = (release / "huggingface/README.md").read_text()
    assert "first 8 of 10042 items" in card
    assert "Pythia-1B" in card
    assert json.loads((release / "evaluation.json").read_text())["rows"]["hellaswag"]["items"] == 8


def write_own_data(folder: Path) -> None:
    """Write a folder of files of several formats and endings, and a recipe for them; nothing is prepared."""
    texts = python_sources(40)
    for number, text in enumerate(texts[:10]):
        write(folder / f"own/docs/{number % 3}/{number}.rst", text.encode())
    write(folder / "own/docs/logo.rst", b"\x89PNG\r\n\x1a\n\0\0")
    write(folder / "own/more/notes.md.gz", COMPRESSIONS[".gz"]("\n\n".join(texts[10:20]).encode()))
    rows = ({"id": number, "body": text} for number, text in enumerate(texts[20:30]))
    write(folder / "own/rows.jsonl", lines(*rows))
    pq.write_table(pa.table({"code": texts[30:]}), folder / "own/code.parquet")
    fields = small_recipe(Path())
    fields["vocab_size"] = 600
    fields["data"]["store"] = "runs/small/store"
    fields["data"]["sources"] = {
        "docs": {"format": "text", "path": "own/docs/**/*.rst", "weight": 1},
        "notes": {"format": "text", "path": "own/more/*", "separator": "\n\n", "weight": 1},
        "rows": {"format": "jsonl", "path": "**/*.jsonl", "text": "body", "weight": 1},  # without those in `runs`
        "code": {"format": "parquet", "path": "own", "text": "code", "weight": 1},
    }
    fields["release"] = {"formats": ["huggingface", "gguf", "ctranslate2"], "tasks": []}
    (folder / "own.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))


def test_killed_run_on_own_files_resumes_to_a_verified_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_own_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    killed = run_command(tmp_path, "run", "own.yaml", fault=kill_at_write("step-00000020"))
    assert killed.status == -signal.SIGKILL, killed.output
    assert re.search(r"^\d/\d training$", killed.output, re.MULTILINE)
    before = Path("runs/small/metrics.jsonl").read_text().splitlines()[:10]

    assert cli.main(["run", "own.yaml"]) == 0
    output, errors = capsys.readouterr()
    assert "sample of" not in output  # the tokenizer was not trained again
    assert "preparing" not in errors
    assert "1 rows, not UTF-8 text" in output
    assert "checks passed" in output
    assert "FAIL" not in output
    assert "not scored: the recipe has no release.tasks" in output
    assert "tinyllama run own.yaml --name small-longer" in output
    measured = re.search(r"validation: ([\d.]+) bits per byte; gzip -9 on the same documents: ([\d.]+)", output)
    assert measured is not None
    assert all(0 < float(number) < 8 for number in measured.groups())
    run = RunDir(tmp_path / "runs/small")
    assert [event["step"] for event in run.events() if event["event"] == "resume"] == [10]
    assert Path("runs/small/metrics.jsonl").read_text().splitlines()[:10] == before
    assert len(list(run.metrics())) == 40

    assert "releasing" in errors
    losses = run.metrics_path.read_bytes()
    # Engines that crash: the same command fails, names them and repeats no other stage.
    monkeypatch.setenv("ENGINES", engines.__file__)
    monkeypatch.setattr(engines, "__file__", str(CRASHING))
    monkeypatch.setenv("CRASH", f"any={int(signal.SIGSEGV)}")
    assert cli.main(["run", "own.yaml"]) == 1
    assert run.metrics_path.read_bytes() == losses
    out, errors = capsys.readouterr()
    assert "releasing" not in errors
    assert measured[0] in out
    assert "\nDone" not in out
    last = out.splitlines()[-1]
    assert "gguf Q8_0 (loads and runs), gguf Q4_K_M (loads and runs)" in last
