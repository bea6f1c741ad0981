"""A damaged run is listed, reported, followed and resumed, or refused in one line."""

import json
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import small_recipe
from tests.fuzz.strategies import (
    assert_one_line,
    edited,
    edited_documents,
    edits_of_bytes,
    fixed_examples,
    shared_folder,
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


def check(name: str, content: bytes) -> None:
    """Check that listing, reporting and resuming a run with this content of a file work or fail in one line."""
    with tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-") as folder:
        own = Path(shutil.copytree(valid_run(), Path(folder) / "run"))
        (own / name).write_bytes(content)
        state = read_run_status(RunDir(own), 1.8e9)
        assert_one_line(InputError(state.problem or "none"))
        assert len(list_runs(own.parent)) >= 2
        run, log = RunDir(own), RunLog(RunDir(own))
        with suppress(ValueError, OSError):  # a tracker reports these as events
            rows_since(run.metrics_path, 0)
        for call in (
            lambda: read_run(own),
            lambda: [dict(row) for row in run.metrics()],
            lambda: [dict(row) for row in run.events()],
            log.drop_partial_lines,
            lambda: log.truncate_after(10),
            lambda: [(checkpoint.find_damage(), checkpoint.is_milestone) for checkpoint in run.checkpoints()],
        ):
            with suppress(OSError):  # the command line names the file
                try:
                    call()
                except InputError as error:
                    assert_one_line(error)


@fixed_examples(100)
@given(name=st.sampled_from(FILES), edits=edits_of_bytes)
def test_run_with_edited_bytes_is_used_or_refused(name: str, edits: Any) -> None:
    check(name, edited((valid_run() / name).read_bytes(), edits))


@fixed_examples(100)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_run_with_edited_values_is_used_or_refused(data: st.DataObject, name: str) -> None:
    text = (valid_run() / name).read_text()
    if name.endswith(".jsonl"):
        lines = text.splitlines()
        place = data.draw(st.integers(0, len(lines) - 1))
        lines[place] = json.dumps(data.draw(edited_documents(json.loads(lines[place]))))
        text = "\n".join(lines) + data.draw(st.sampled_from(["\n", ""]))
    else:
        text = json.dumps(data.draw(edited_documents(yaml.safe_load(text))))  # JSON is YAML too
    check(name, text.encode())
