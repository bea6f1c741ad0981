"""Training next to trackers that work, fail, block, never end or are killed: real processes and real sinks."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.tracking.run_files import follow, new_run, write_release, write_resume, write_steps
from wandb.proto.wandb_internal_pb2 import Record

from tinyllama.errors import InputError
from tinyllama.files import read_json
from tinyllama.recipe import Track
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking import trackers
from tinyllama.tracking.follow import SinkPosition, read_position
from tinyllama.tracking.trackers import check_trackers, enabled_trackers

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
_HEADER_BYTES, _BLOCK_BYTES = 7, 32768
"""Sizes in bytes in a .wandb file (LevelDB's log format): a header (of the file or of a chunk), and a block."""
_FULL_CHUNK, _LAST_CHUNK = 1, 4
"""Chunk types that end a record."""
STEPS = 12
OF_SOURCE = "validation_bits_per_byte/lines"
ALL_TRACKERS = Track(trackio=True, wandb="probe", tensorboard=True)
RANDOM = random.Random(7)
NUM_KILLS = 4
Tracker = subprocess.Popen[bytes]


def fake_wandb(mode: str, folder: Path) -> dict[str, str]:
    """Return variables with which a process imports fake_wandb/wandb.py as wandb; none without a mode."""
    path = os.pathsep.join(filter(None, [str(HERE / "fake_wandb"), os.environ.get("PYTHONPATH")]))
    return {"FAKE_WANDB": mode, "FAKE_WANDB_FOLDER": str(folder), "PYTHONPATH": path} if mode else {}


def train(
    small: Path, folder: Path, *flags: str, fake: str = "", timeouts: tuple[float, float] = (60, 60), **variables: str
) -> tuple[RunDir, str]:
    """Train in `folder` with a fake wandb if `fake` is its mode; return the run and the standard error.

    `timeouts` are in seconds, for a call to a tracker and for all trackers at the end.
    """
    command = [sys.executable, HERE / "train_with_timeouts.py", *timeouts, "train", small / "recipe.yaml", *flags]
    done = subprocess.run(
        [*map(str, command), "--train.tokens", str(STEPS * 6 * 64)],
        cwd=folder,
        env=os.environ | fake_wandb(fake, folder) | variables,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return RunDir(folder / "runs/small"), done.stderr


def read_tensorboard_log(run: RunDir) -> EventAccumulator:
    found = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def wandb_rows(run: RunDir) -> list[dict[str, Any]]:
    """Return the rows in all of W&B's files, in the order in which they were written."""
    found = [record.history for record in _wandb_records(run) if record.HasField("history")]
    return [{(item.key or item.nested_key[0]): json.loads(item.value_json) for item in one.item} for one in found]


def wandb_alerts(run: RunDir) -> list[str]:
    return [record.alert.title for record in _wandb_records(run) if record.HasField("alert")]


def _wandb_records(run: RunDir) -> Iterator[Record]:
    paths = sorted(run.path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime)
    for path in paths:
        with path.open("rb") as file:
            yield from map(Record.FromString, _read_records(file))


def _read_records(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the complete records of a .wandb file, up to the first record that a kill has truncated."""
    offset, record = _HEADER_BYTES, b""
    while block := file.read(_BLOCK_BYTES):
        while offset + _HEADER_BYTES <= len(block):  # the rest of the block is padding, too small for a chunk's header
            end = offset + _HEADER_BYTES + int.from_bytes(block[offset + 4 : offset + 6], "little")
            chunk_type = block[offset + 6]
            if end > len(block) or chunk_type == 0:
                return
            record += block[offset + _HEADER_BYTES : end]
            offset = end
            if chunk_type in (_FULL_CHUNK, _LAST_CHUNK):
                yield record
                record = b""
        offset = 0


def events_of_tracker(run: RunDir, name: str, fake: str = "") -> list[str]:
    """Return the events that a tracker's process reports for a run that has ended; the process must succeed."""
    start = ["-m", "tinyllama.processes", str(os.getpid()), "tinyllama.tracking.trackers"]
    command = [sys.executable, *start, str(run.path), name, "60"]
    environment = os.environ | fake_wandb(fake, run.path)
    done = subprocess.run(command, input="", capture_output=True, text=True, env=environment, check=True)
    return [json.loads(line)["event"] for line in done.stdout.splitlines()]


def events(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == name]


def weights_hash(run: RunDir) -> str:
    return str(read_json(run.checkpoint(STEPS).commit_path)["sha256"]["__0_0.distcp"])


@pytest.fixture(scope="module")
def untracked_weights(small: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the final weights of a run without trackers."""
    run, _ = train(small, tmp_path_factory.mktemp("untracked"))
    assert not run.trackers_dir.exists()
    return weights_hash(run)


def test_trackers_have_every_step_and_change_no_weight(small: Path, tmp_path: Path, untracked_weights: str) -> None:
    flags = ["--track.trackio", "true", "--track.wandb", "probe", "--track.tensorboard", "true"]
    run, _ = train(small, tmp_path, *flags, WANDB_MODE="offline")
    assert weights_hash(run) == untracked_weights
    steps = list(range(1, STEPS + 1))
    assert [read_position(run, name).step for name in enabled_trackers(ALL_TRACKERS)] == [STEPS] * 3
    rows = [row for row in wandb_rows(run) if "loss" in row]
    assert [row["step"] for row in rows] == steps
    assert [row["loss"] for row in rows] == [row["loss"] for row in run.metrics()]
    assert [event.step for event in read_tensorboard_log(run).Scalars("loss")] == steps
    of_source = {row["step"]: row[OF_SOURCE] for row in run.metrics() if OF_SOURCE in row}
    assert of_source and {row["step"]: row[OF_SOURCE] for row in rows if OF_SOURCE in row} == of_source
    shown = {event.step: event.value for event in read_tensorboard_log(run).Scalars(OF_SOURCE)}
    assert shown == pytest.approx(of_source)
    assert read_trackio(run)[0] == steps
    assert not events(run, "tracker-failed") + events(run, "tracker-blocked")


@pytest.mark.parametrize(
    ("fake", "problem"),
    [("raise", "ConnectionError: no page today"), ("kill", "its process ended with status -9")],
)
def test_a_failed_tracker_is_one_event_and_one_line(
    small: Path, tmp_path: Path, untracked_weights: str, fake: str, problem: str
) -> None:
    run, stderr = train(small, tmp_path, "--track.wandb", "probe", fake=fake)
    assert weights_hash(run) == untracked_weights
    (event,) = events(run, "tracker-failed")
    assert (event["tracker"], event["problem"]) == ("wandb", problem)
    assert stderr.count(problem) == 1


@pytest.mark.parametrize("fake", ["exit", "import error"])
def test_a_tracker_process_reports_every_kind_of_failure(run: RunDir, log: RunLog, fake: str) -> None:
    write_steps(log, 1, 3)
    assert events_of_tracker(run, "wandb", fake) == ["tracker-failed"]


@pytest.mark.parametrize("fake", ["block", "block the interpreter"])
def test_a_blocking_tracker_delays_neither_training_nor_its_end(
    small: Path, tmp_path: Path, untracked_weights: str, fake: str
) -> None:
    flags = ["--track.wandb", "probe", "--track.tensorboard", "true"]
    run, stderr = train(small, tmp_path, *flags, fake=fake, timeouts=(1, 6))
    assert weights_hash(run) == untracked_weights
    assert "wandb is still busy" in stderr
    assert len(read_tensorboard_log(run).Scalars("loss")) == STEPS  # the other tracker is complete
    if fake == "block":
        assert "wandb" in [event["tracker"] for event in events(run, "tracker-blocked")]
        assert stderr.count("wandb blocks") == 1


def test_a_tracker_that_blocks_at_exit_is_killed(small: Path, tmp_path: Path, untracked_weights: str) -> None:
    run, stderr = train(small, tmp_path, "--track.wandb", "probe", fake="block at exit", timeouts=(60, 2))
    assert weights_hash(run) == untracked_weights
    assert "wandb is still busy" in stderr


def _file(folder: Path) -> None:
    folder.write_text("not a folder")


def _full_database(folder: Path) -> None:
    folder.mkdir()
    (folder / "tinyllama.db").symlink_to("/dev/full")


def _unreadable_lock(folder: Path) -> None:
    folder.mkdir()
    (folder / "tinyllama.lock").mkdir()


@pytest.mark.parametrize("damage", [_file, _full_database, _unreadable_lock])
def test_a_trackio_folder_that_cannot_be_written_is_reported(
    run: RunDir, log: RunLog, damage: Callable[[Path], None]
) -> None:
    write_steps(log, 1, 3)
    damage(run.path.parent / ".trackio")
    assert events_of_tracker(run, "trackio") == ["tracker-failed"]


def test_a_corrupted_trackio_database_fails_only_its_tracker(
    small: Path, tmp_path: Path, untracked_weights: str
) -> None:
    folder = tmp_path / "runs/.trackio"
    folder.mkdir(parents=True)
    (folder / "tinyllama.db").write_bytes(b"no database" * 1000)
    run, _ = train(small, tmp_path, "--track.trackio", "true")
    assert weights_hash(run) == untracked_weights
    assert [event["tracker"] for event in events(run, "tracker-failed")] == ["trackio"]


def test_a_missing_tracker_is_reported_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else object())
    check_trackers(Track(tensorboard=True))
    with pytest.raises(InputError, match=r'^track\.wandb: .*; .*"tinyllama\[track\]".* track\.wandb to null$'):
        check_trackers(ALL_TRACKERS)


def test_tensorboard_drops_rolled_back_steps_and_has_events_scores_and_baselines(run: RunDir, log: RunLog) -> None:
    from tinyllama.tracking.tensorboard_sink import TensorBoardSink

    follower = follow(run, TensorBoardSink(run, run.recipe(), SinkPosition()))
    write_steps(log, 1, 25)
    follower.poll()
    log.event("rollback", 26, reason="spike", checkpoint=20, skipped_batches=[24, 25])
    write_resume(log, 20)
    write_steps(log, 21, 23, change=0.5)
    write_release(run, 10, 30.0, [{"name": "Big", "hellaswag": 60.0, "source": "published, a card"}])
    follower.poll()
    follower.close()
    shown = read_tensorboard_log(run)
    losses = {event.step: event.value for event in shown.Scalars("loss")}
    assert [*losses] == list(range(1, 24))
    assert losses[22] == pytest.approx(1 + 8 / 22 + 0.5)
    assert [event.value for event in shown.Scalars("scores/hellaswag acc_norm")] == [pytest.approx(30.0)]
    texts = [event.tensor_proto.string_val[0].decode() for event in shown.Tensors("events")]
    assert "rollback at step 26: spike; checkpoint 20; skipped batches: 24, 25" in texts
    baseline = EventAccumulator(str(run.path / "tensorboard/baselines/Big (published)"))
    baseline.Reload()
    line = [(event.step, event.value) for event in baseline.Scalars("scores/hellaswag acc_norm")]
    assert line == [(0, 60.0), (40, 60.0)]


def test_wandb_has_one_id_over_all_processes_of_a_run(small: Path, tmp_path: Path) -> None:
    for _ in range(2):
        run, _ = train(small, tmp_path, "--track.wandb", "probe", fake="record")
        shutil.rmtree(run.checkpoint(STEPS).path)  # as if killed before it: the run resumes from the previous one
    first, second = (tmp_path / "ids").read_text().splitlines()
    assert first == second
    assert first.endswith(" probe")
    assert (tmp_path / "rows").read_text().split() == [str(number) for number in range(1, STEPS + 1)]


# Trackers that are killed at any moment: the sink has each item once


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
    shown = read_tensorboard_log(run)
    texts = [event.tensor_proto.string_val[0].decode() for event in shown.Tensors("events")]
    scored = [event.step for event in shown.Scalars("scores/boolq acc")]
    return [event.step for event in shown.Scalars("loss")], scored, sum(text.startswith("hang") for text in texts)


def read_trackio(run: RunDir) -> tuple[list[int], list[int], int]:
    with closing(sqlite3.connect(run.path.parent / ".trackio/tinyllama.db")) as database:
        logs = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY step", [run.name])
        rows = [(step, json.loads(metrics)) for step, metrics in logs]
        errors = database.execute("SELECT title FROM alerts WHERE run_name = ?", [run.name]).fetchall()
    scored = [step for step, row in rows if "scores/boolq acc" in row]
    return [step for step, row in rows if "loss" in row], scored, len(errors)


READERS: dict[str, Callable[[RunDir], tuple[list[int], list[int], int]]] = {
    "trackio": read_trackio,
    "wandb": read_wandb,
    "tensorboard": read_tensorboard,
}


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_a_tracker_killed_at_random_has_each_row_score_and_error_once(run: RunDir, log: RunLog, name: str) -> None:
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


def test_rows_that_wandbs_server_lacks_are_delivered_after_a_kill(tmp_path: Path, run: RunDir, log: RunLog) -> None:
    for last_step, status in ((3, -signal.SIGKILL), (8, -signal.SIGKILL), (0, 0)):
        write_steps(log, log.step + 1, log.step + 5)
        fake = fake_wandb("record", tmp_path) | {"FAKE_WANDB_LAST_STEP": str(last_step)}
        tracker = start_tracker(run, "wandb", **fake)
        output = tracker.communicate()[0].decode()
        assert tracker.returncode == status, output
    assert (tmp_path / "rows").read_text().split() == [str(number) for number in range(1, 16)]


def test_trackio_has_the_new_values_of_rolled_back_steps_and_of_another_run_of_the_name(
    run: RunDir, log: RunLog, tmp_path: Path
) -> None:
    write_steps(log, 1, 25)
    finish(start_tracker(run, "trackio"))
    log.event("rollback", 26, reason="spike", checkpoint=20, skipped_batches=[24, 25])
    write_resume(log, 20)
    write_steps(log, 21, 23, change=0.5)
    finish(start_tracker(run, "trackio"))
    assert read_trackio(run) == (list(range(1, 24)), [], 1)
    other, log = new_run(tmp_path / "second")
    write_steps(log, 1, 2)
    (run.path.parent / ".trackio").rename(other.path.parent / ".trackio")
    finish(start_tracker(other, "trackio"))
    assert read_trackio(other) == ([1, 2], [], 0)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])  # trackio's position is deleted before a delivery
def test_items_delivered_after_the_saved_position_are_there_once(run: RunDir, log: RunLog, name: str) -> None:
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
