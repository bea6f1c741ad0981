"""A tracker's process is killed at any moment, and what it showed is there once: real sinks, real SIGKILLs."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.tracking.recorded import new_run, release, step
from tests.tracking.shown import tensorboard, wandb_alerts, wandb_rows

from tinyllama.files import read_json
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import read_position

pytestmark = pytest.mark.slow

_TRACKER = "import sys; from tinyllama.tracking.trackers import main; sys.exit(main(*sys.argv[1:]))"
_CHANCE = random.Random(7)
_LIVES = 4


def tracker(run: Path, name: str, before: str = "") -> "subprocess.Popen[bytes]":
    """The process that follows a run; `before` is carried out in it first."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{before}\n{_TRACKER}", str(run), name, "60"],
        env=os.environ | {"WANDB_MODE": "offline"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def when(path: Path) -> int:
    """When a file was written; the tracker saves its position each time after it has shown what was new."""
    return path.stat().st_mtime_ns if path.is_file() else 0


def kill(process: "subprocess.Popen[bytes]", whole_group: bool) -> None:
    """End the tracker without a word; with its whole group, W&B's own process too."""
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGKILL) if whole_group else process.kill()
    process.communicate()


def finish(process: "subprocess.Popen[bytes]") -> None:
    said = process.communicate()[0].decode()
    assert process.returncode == 0, said
    assert "tracker-failed" not in said, said


def write_while(process: "subprocess.Popen[bytes]", journal: RunLog, has_begun: Callable[[], bool]) -> None:
    """Write rows, and now and then an error and a release's score, until some time after the tracker has begun."""
    left = _CHANCE.randrange(10, 60)
    while left and process.poll() is None:
        left -= has_begun()
        first = journal.step + 1
        step(journal, first, first + _CHANCE.randrange(1, 12))
        if _CHANCE.random() < 0.1:
            journal.event("hang", journal.step, problem="none")
        if _CHANCE.random() < 0.1:
            release(journal.run.path, journal.step, 30.0)
        time.sleep(0.05)


def _has_moved(position: Path, before: int) -> bool:
    return when(position) != before


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_killed_at_random_moments_has_every_row_score_and_error_once(
    tmp_path: Path, name: str
) -> None:
    run, journal = new_run(tmp_path)
    position = run / "trackers" / f"{name}.json"
    for life in range(_LIVES):
        process, before = tracker(run, name), when(position)
        write_while(process, journal, partial(_has_moved, position, before))
        kill(process, whole_group=life % 2 == 0)
    release(run, journal.step, 30.0)
    finish(tracker(run, name))
    steps, scored, errors = _READERS[name](run)
    assert steps == list(range(1, journal.step + 1))
    assert scored == sorted(read_json(path)["step"] for path in run.glob("releases/step-*/evaluation.json"))
    events = (run / "events.jsonl").read_text().splitlines()
    written = sum('"hang"' in line for line in events)
    # W&B sends one that it was given just before a kill again, and any process may have been killed there.
    assert 0 < written <= errors <= written + (_LIVES if name == "wandb" else 0)
    assert read_position(RunDir(run), name).step == journal.step


_SERVER = """
import json, os, signal, sys, types
from pathlib import Path
folder = Path({folder!r})
def init(**more):
    there = (folder / "server").read_text().split() if (folder / "server").exists() else []
    run = types.SimpleNamespace(offline=False, starting_step=int(there[-1]) + 1 if there else 0, config={{}})
    run.define_metric = run.alert = lambda *a, **k: None
    def log(row, step, commit):
        with (folder / "server").open("a") as file: file.write(f"{{step}} ")
        with (folder / "rows").open("a") as file: file.write(f"{{row['step']}} ")
        if row["step"] == {last}: os.kill(os.getpid(), signal.SIGKILL)
    run.log, run.finish = log, lambda: None
    return run
sys.modules["wandb"] = types.SimpleNamespace(init=init, Settings=dict)
"""


def test_online_the_rows_that_wandbs_server_lacks_are_delivered_after_a_kill(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    for last, status in ((3, -signal.SIGKILL), (8, -signal.SIGKILL), (0, 0)):
        step(journal, journal.step + 1, journal.step + 5)
        process = tracker(run, "wandb", _SERVER.format(folder=str(tmp_path), last=last))
        said = process.communicate()[0].decode()
        assert process.returncode == status, said
    assert (tmp_path / "rows").read_text().split() == [str(number) for number in range(1, 16)]


def _of_wandb(run: Path) -> tuple[list[int], list[int], int]:
    rows = wandb_rows(run)
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))  # W&B drops a row whose step is not above the last
    scored = [row["step"] for row in rows if "scores/boolq acc" in row]
    return [row["step"] for row in rows if "loss" in row], scored, len(wandb_alerts(run))


def _of_tensorboard(run: Path) -> tuple[list[int], list[int], int]:
    shown = tensorboard(run)
    texts = [event.tensor_proto.string_val[0].decode() for event in shown.Tensors("events")]
    scored = [event.step for event in shown.Scalars("scores/boolq acc")]
    return [event.step for event in shown.Scalars("loss")], scored, sum(text.startswith("hang") for text in texts)


_READERS: dict[str, Callable[[Path], tuple[list[int], list[int], int]]] = {
    "wandb": _of_wandb,
    "tensorboard": _of_tensorboard,
}


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_what_a_process_delivered_and_had_no_time_to_note_is_there_once(tmp_path: Path, name: str) -> None:
    run, journal = new_run(tmp_path)
    position = run / "trackers" / f"{name}.json"
    step(journal, 1, 20)
    finish(tracker(run, name))
    before = position.read_bytes()
    step(journal, 21, 25)
    journal.event("hang", 20, problem="none")
    release(run, 10, 30.0)
    finish(tracker(run, name))
    position.write_bytes(before)
    step(journal, 26, 30)
    finish(tracker(run, name))
    assert _READERS[name](run) == (list(range(1, 31)), [10], 1)
