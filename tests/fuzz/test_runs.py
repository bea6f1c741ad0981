"""A damaged run is listed, reported, followed and resumed, or refused in one line: never a traceback."""

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
from tests.fuzz.strategies import (
    assert_one_line,
    fixed_examples,
    mutate,
    mutated_documents,
    mutations,
    shared_folder,
    values,
)

from tinyllama.errors import InputError
from tinyllama.files import rows_since, sha256_of, write_json
from tinyllama.report.content import read_run
from tinyllama.runs.listing import list_runs, read_run_status
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir

METRICS = {"loss": 3.5, "learning_rate": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 700.0, "mfu": 0.2}
FILES = ["metrics.jsonl", "events.jsonl", "recipe.yaml", "releases/releases.json"]
FILES += [f"checkpoints/step-00000010/{name}.json" for name in ("state", "commit")]


@cache
def valid_run() -> Path:
    """A small run's folder without weights. Read only."""
    folder = shared_folder() / "run"
    folder.mkdir()
    recipe = small_recipe(folder) | {"release": {"every_tokens": 3840}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    log = RunLog(RunDir(folder), clock=lambda: 1.8e9)
    log.event("start", 0, ranks=1)
    for step in range(1, 21):
        validation = {"validation_loss": 3.0, "validation_bits_per_byte": 2.0} if step % 10 == 0 else {}
        log.metrics({"step": step, "tokens": step * 384, **METRICS, **validation})
    log.event("checkpoint", 10, seconds=0.2, stall_seconds=0.1)
    log.event("signal", 20, signal="SIGTERM")
    checkpoint = folder / "checkpoints/step-00000010"
    write_json(checkpoint / "state.json", {"step": 10, "milestone": True, "vocab_size": 400, "guard": {}})
    write_json(checkpoint / "commit.json", {"sha256": {"state.json": sha256_of(checkpoint / "state.json")}})
    write_json(folder / "releases/releases.json", {"releases": [], "baselines": []})
    return folder


@contextmanager
def mutated_run(name: str, content: bytes) -> Iterator[Path]:
    """Yield a copy of the run with another content of one file."""
    with tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-") as folder:
        own = Path(shutil.copytree(valid_run(), Path(folder) / "run"))
        (own / name).write_bytes(content)
        yield own


def use(own: Path) -> None:
    """Check that listing, reporting and resuming a run work or fail in one line."""
    state = read_run_status(RunDir(own), 1.8e9)
    assert_one_line(InputError(state.problem or "none"))
    assert len(list_runs(own.parent)) >= 2
    for call in (read_run, _rows, _follow, _truncate, _checkpoints):
        with suppress(OSError):  # the command line names the file
            try:
                call(own)
            except InputError as error:
                assert_one_line(error)


def _checkpoints(own: Path) -> None:
    for checkpoint in RunDir(own).checkpoints():
        checkpoint.find_damage()
        assert checkpoint.is_milestone in (True, False)


def _rows(own: Path) -> None:
    for read in (RunDir(own).metrics, RunDir(own).events):
        with suppress(InputError):
            assert all(isinstance(row, dict) for row in read())


def _follow(own: Path) -> None:
    """Read as a tracker does, which reports a ValueError for a line."""
    with suppress(ValueError):
        rows_since(RunDir(own).metrics_path, 0)


def _truncate(own: Path) -> None:
    log = RunLog(RunDir(own))
    log.drop_partial_lines()
    log.truncate_after(10)


@fixed_examples(100)
@given(name=st.sampled_from(FILES), edits=mutations)
def test_run_with_mutated_bytes_is_used_or_one_line(name: str, edits: Any) -> None:
    with mutated_run(name, mutate((valid_run() / name).read_bytes(), edits)) as own:
        use(own)


@fixed_examples(100)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_run_with_mutated_values_is_used_or_one_line(data: st.DataObject, name: str) -> None:
    text = (valid_run() / name).read_text()
    if name.endswith(".jsonl"):
        lines = text.splitlines()
        place = data.draw(st.integers(0, len(lines) - 1))
        lines[place] = json.dumps(data.draw(mutated_documents(json.loads(lines[place])) | values))
        text = "\n".join(lines) + data.draw(st.sampled_from(["\n", ""]))
    elif name.endswith(".json"):
        text = json.dumps(data.draw(mutated_documents(json.loads(text)) | values))
    else:
        text = yaml.safe_dump(data.draw(mutated_documents(yaml.safe_load(text)) | values))
    with mutated_run(name, text.encode()) as own:
        use(own)
