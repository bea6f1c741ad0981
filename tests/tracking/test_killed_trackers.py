"""A tracker's process is killed at any moment, and the sink still has each item once: real sinks, real SIGKILLs."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tracking.read_back import tensorboard, wandb_alerts, wandb_rows
from tests.tracking.run_files import new_run, write_release, write_steps
from tests.tracking.test_trackers import fake_wandb

from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import read_position

pytestmark = pytest.mark.slow

RANDOM = random.Random(7)
NUM_KILLS = 4

Tracker = subprocess.Popen[bytes]


def start_tracker(run: RunDir, name: str, **variables: str) -> Tracker:
    module = ["-m", "tinyllama.processes", str(os.getpid()), "tinyllama.tracking.trackers"]
    return subprocess.Popen(
        [sys.executable, *module, str(run.path), name, "60"],
        env=os.environ | {"WANDB_MODE": "offline"} | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kill(tracker: Tracker, process_group: bool) -> None:
    """Kill the tracker; with its process group, W&B's own process too."""
    assert tracker.poll() is None, tracker.communicate()
    os.killpg(tracker.pid, signal.SIGKILL) if process_group else tracker.kill()
    tracker.communicate()


def finish(tracker: Tracker) -> None:
    output = tracker.communicate()[0].decode()
    assert tracker.returncode == 0, output
    assert "tracker-failed" not in output, output


def modification_time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def write_until_followed(tracker: Tracker, run: RunDir, log: RunLog, position: Path) -> None:
    """Write rows, some errors and release scores, until a while after the tracker has first saved its position."""
    saved, rounds_left = modification_time(position), RANDOM.randrange(10, 60)
    while rounds_left and tracker.poll() is None:
        rounds_left -= modification_time(position) != saved
        write_steps(log, log.step + 1, log.step + RANDOM.randrange(2, 13))
        if RANDOM.random() < 0.1:
            log.event("hang", log.step, problem="none")
        if RANDOM.random() < 0.1:
            write_release(run, log.step, 30.0)
        time.sleep(0.05)


def read_wandb(run: RunDir) -> tuple[list[int], list[int], int]:
    """Return the steps with a loss, the steps with a score, and the number of errors."""
    rows = wandb_rows(run)
    wandb_steps = [row["_step"] for row in rows]
    assert wandb_steps == sorted(set(wandb_steps))  # W&B drops a row whose step is not above the last one
    scored = [row["step"] for row in rows if "scores/boolq acc" in row]
    return [row["step"] for row in rows if "loss" in row], scored, len(wandb_alerts(run))


def read_tensorboard(run: RunDir) -> tuple[list[int], list[int], int]:
    shown = tensorboard(run)
    texts = [event.tensor_proto.string_val[0].decode() for event in shown.Tensors("events")]
    scored = [event.step for event in shown.Scalars("scores/boolq acc")]
    return [event.step for event in shown.Scalars("loss")], scored, sum(text.startswith("hang") for text in texts)


READERS: dict[str, Callable[[RunDir], tuple[list[int], list[int], int]]] = {
    "wandb": read_wandb,
    "tensorboard": read_tensorboard,
}


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_killed_at_random_has_each_row_score_and_error_once(tmp_path: Path, name: str) -> None:
    run, log = new_run(tmp_path)
    for number in range(NUM_KILLS):
        tracker = start_tracker(run, name)
        write_until_followed(tracker, run, log, run.tracker_position_path(name))
        kill(tracker, process_group=number % 2 == 0)
    write_release(run, log.step, 30.0)
    finish(start_tracker(run, name))
    steps, scored, errors = READERS[name](run)
    assert steps == list(range(1, log.step + 1))
    assert scored == [metadata["step"] for _, metadata in run.releases.releases()]
    written = sum(event["event"] == "hang" for event in run.events())
    # W&B repeats an alert that it was given just before a kill, which may be true of each kill.
    assert 0 < written <= errors <= written + (NUM_KILLS if name == "wandb" else 0)
    assert read_position(run, name).step == log.step


def test_rows_that_wandbs_server_lacks_are_delivered_after_a_kill(tmp_path: Path) -> None:
    run, log = new_run(tmp_path)
    for last_step, status in ((3, -signal.SIGKILL), (8, -signal.SIGKILL), (0, 0)):
        write_steps(log, log.step + 1, log.step + 5)
        fake = fake_wandb("record", tmp_path) | {"FAKE_WANDB_LAST_STEP": str(last_step)}
        tracker = start_tracker(run, "wandb", **fake)
        output = tracker.communicate()[0].decode()
        assert tracker.returncode == status, output
    assert (tmp_path / "rows").read_text().split() == [str(number) for number in range(1, 16)]


@pytest.mark.parametrize("name", READERS)
def test_items_delivered_after_the_saved_position_are_there_once(tmp_path: Path, name: str) -> None:
    run, log = new_run(tmp_path)
    position = run.tracker_position_path(name)
    write_steps(log, 1, 20)
    finish(start_tracker(run, name))
    saved = position.read_bytes()
    write_steps(log, 21, 25)
    log.event("hang", 20, problem="none")
    write_release(run, 10, 30.0)
    finish(start_tracker(run, name))
    position.write_bytes(saved)
    write_steps(log, 26, 30)
    finish(start_tracker(run, name))
    assert READERS[name](run) == (list(range(1, 31)), [10], 1)
