"""A damaged run is listed, reported, followed and resumed, or one line says why not: never a traceback."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import small_recipe
from tests.fuzz.mutations import changed, changes, documents, values
from tests.fuzz.properties import few, kept_folder, one_line

from tinyllama.errors import InputError
from tinyllama.files import sha256_of, write_json
from tinyllama.report.run_data import read_run
from tinyllama.runs.listing import list_runs, read_run_status
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir

METRICS = {"loss": 3.5, "learning_rate": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 700.0, "mfu": 0.2}
FILES = ["metrics.jsonl", "events.jsonl", "recipe.yaml", "releases/releases.json"]
FILES += [f"checkpoints/step-00000010/{name}.json" for name in ("state", "commit")]


@cache
def run() -> Path:
    """A small run's folder without its weights. Read only."""
    folder = kept_folder() / "run"
    folder.mkdir()
    recipe = small_recipe(folder) | {"release": {"every_tokens": 3840}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    journal = RunLog(RunDir(folder), clock=lambda: 1.8e9)
    journal.event("start", 0, ranks=1)
    for step in range(1, 21):
        validation = {"validation_loss": 3.0, "validation_bits_per_byte": 2.0} if step % 10 == 0 else {}
        journal.metrics({"step": step, "tokens": step * 384, **METRICS, **validation})
    journal.event("checkpoint", 10, seconds=0.2, stall_seconds=0.1)
    journal.event("signal", 20, signal="SIGTERM")
    checkpoint = folder / "checkpoints/step-00000010"
    write_json(checkpoint / "state.json", {"step": 10, "milestone": True, "vocab_size": 400, "guard": {}})
    write_json(checkpoint / "commit.json", {"sha256": {"state.json": sha256_of(checkpoint / "state.json")}})
    write_json(folder / "releases/releases.json", {"releases": [], "baselines": []})
    return folder


@contextmanager
def own_run(name: str, content: bytes) -> Iterator[Path]:
    """The run with one file's content changed."""
    with tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-") as folder:
        own = Path(shutil.copytree(run(), Path(folder) / "run"))
        (own / name).write_bytes(content)
        yield own


def use(own: Path) -> None:
    """What lists, reports and resumes a run: each works, or says in one line why not."""
    state = read_run_status(own, 1.8e9)
    one_line(InputError(state.problem or "none"))
    assert len(list_runs(own.parent)) >= 2
    for call in (read_run, _rows, _follow, _cut_back, _checkpoints):
        with suppress(OSError):  # of which the command line says the file
            try:
                call(own)
            except InputError as error:
                one_line(error)


def _checkpoints(own: Path) -> None:
    for checkpoint in RunDir(own).checkpoints():
        checkpoint.find_damage()
        assert checkpoint.is_milestone in (True, False)


def _rows(own: Path) -> None:
    for read in (RunDir(own).metrics, RunDir(own).events):
        with suppress(InputError):
            assert all(isinstance(row, dict) for row in read())


def _follow(own: Path) -> None:
    """A tracker says any error in words; that of a line is a ValueError."""
    with suppress(ValueError):
        RunDir(own).metrics_since(0)


def _cut_back(own: Path) -> None:
    journal = RunLog(RunDir(own))
    journal.drop_partial_lines()
    journal.truncate_after(10)


@few(100)
@given(name=st.sampled_from(FILES), todo=changes)
def test_a_run_with_changed_bytes_is_told_in_words(name: str, todo: Any) -> None:
    with own_run(name, changed((run() / name).read_bytes(), todo)) as own:
        use(own)


@few(100)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_a_run_with_other_values_is_told_in_words(data: st.DataObject, name: str) -> None:
    text = (run() / name).read_text()
    if name.endswith(".jsonl"):
        lines = text.splitlines()
        place = data.draw(st.integers(0, len(lines) - 1))
        lines[place] = json.dumps(data.draw(documents(json.loads(lines[place])) | values))
        text = "\n".join(lines) + data.draw(st.sampled_from(["\n", ""]))
    elif name.endswith(".json"):
        text = json.dumps(data.draw(documents(json.loads(text)) | values))
    else:
        text = yaml.safe_dump(data.draw(documents(yaml.safe_load(text)) | values))
    with own_run(name, text.encode()) as own:
        use(own)
