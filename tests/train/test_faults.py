"""Real faults during training: killed and stopped ranks, signals, full disks."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.fault_injection import Fault, inject_into_losses
from tests.train.launch import (
    TrainingProcess,
    assert_same_run,
    event_steps,
    fault_in_batch,
    has_metrics,
    load_weights,
    mount_small_disk,
    read_events,
    read_losses,
    read_metrics,
    start_training,
    train_to_end,
)
from tests.train.single_process import load_recipe

from tinyllama import cli
from tinyllama.errors import INTERRUPTED_STATUS
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.train.loop import train

pytest_plugins = ["tests.train.fixtures"]
pytestmark = pytest.mark.slow


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, which must be intact."""
    newest = RunDir(run).find_checkpoint()
    assert newest.find_damage() == []
    return newest.step


def decisions(run: Path) -> list[tuple[Any, ...]]:
    """Return the events without what is measured."""
    keys = ("event", "step", "checkpoint", "skipped_batches")
    return [tuple(row.get(key) for key in keys) for row in read_events(run)]


# Guard


def test_guard_decides_alike_on_all_ranks_and_on_one_process(
    small: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(small, **{"guard.spike_window_steps": 8})
    # Of six rows the first three are rank 0's.
    places = (("nan", 3, 5), ("infinite", 5, 0), ("spike", 17, 4))
    faults = [fault_in_batch(recipe, *place) for place in places]
    run = train_to_end(small, work_dir / "two", "--guard.spike_window_steps", "8", ranks=2, faults=faults)
    recorded = [[json.loads(line) for line in (work_dir / f"two/decisions-{rank}.jsonl").open()] for rank in range(2)]
    assert recorded[0] == recorded[1]
    actions = [(number, decision[2]) for number, decision in enumerate(recorded[0]) if decision[2] != "apply"]
    assert actions == [(3, "skip"), (5, "skip"), (17, "roll back")]
    inject_into_losses(faults, monkeypatch.setattr)
    single = train(recipe)
    assert decisions(run) == decisions(single)
    assert [(row["step"], row["loss"]) for row in read_metrics(run) if "skipped" in row] == [(4, None), (6, None)]
    losses, expected = ([loss for _, loss in read_losses(folder) if loss] for folder in (run, single))
    assert losses == pytest.approx(expected, rel=1e-5)
    ours, theirs = load_weights(run), load_weights(single)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


# Ranks that die or hang


@pytest.mark.long
def test_killed_rank_is_restarted_by_torchrun(small: Path, tmp_path: Path, reference_run_2_ranks: Path) -> None:
    kills: list[Fault] = [
        fault_in_batch(load_recipe(small), "kill", 13, 5),
        {"do": "kill", "file": "checkpoints/step-00000020/__1_0.distcp"},
        {"do": "kill", "file": "checkpoints/step-00000030/commit.json"},
    ]
    run = train_to_end(small, tmp_path, ranks=2, faults=kills, options=["--max-restarts=3"])
    assert len(list(tmp_path.glob("struck-*"))) == len(kills)
    assert event_steps(run, "start", "resume") == [0, 10, 10, 20]
    assert_same_run(run, reference_run_2_ranks)


@pytest.mark.long
def test_hanging_rank_is_logged_and_restarted(small: Path, tmp_path: Path, reference_run_2_ranks: Path) -> None:
    stop = fault_in_batch(load_recipe(small), "stop", 13, 4)
    # More than one restart, because on a busy machine a step may take as long.
    flags, options = ("--guard.watchdog_seconds", "8"), ["--max-restarts=4"]
    with start_training(small, tmp_path, *flags, ranks=2, faults=[stop], options=options) as training:
        training.wait_until_injected(stop)
        stopped = training.workers()[1]
        training.wait_until(lambda: bool(read_events(training.run, "hang")), "the event of the hang")
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)  # torchrun does this itself after 30 s
        assert training.end() == 0, training.output()
    hangs = [(row["step"], row["rank"], row["seconds"]) for row in read_events(training.run, "hang")]
    assert (14, 0, 8.0) in hangs
    assert_same_run(training.run, reference_run_2_ranks)


# Signals


def assert_saved_by(training: TrainingProcess, name: str, step: int) -> None:
    """Assert that a run ended after a signal with a checkpoint of the newest step."""
    assert newest_step(training.run) == step == read_metrics(training.run)[-1]["step"]
    last = read_events(training.run)[-1]
    assert (last["event"], last["step"], last["signal"]) == ("signal", step, name)


def press_ctrl_c(training: TrainingProcess, wait: Fault, step: int) -> None:
    """Press Ctrl-C while the fault `wait` holds a step; end the step after the message."""
    training.wait_until_injected(wait)
    training.send_signal(signal.SIGINT)
    training.wait_until(lambda: f"finishing step {step}" in training.output(), "the message, during the step")
    training.resume_waiting()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_exits_with_the_requeue_status(
    small: Path, work_dir: Path, reference_run: Path, number: signal.Signals
) -> None:
    wait = fault_in_batch(load_recipe(small), "wait", 13, 3)
    with start_training(small, work_dir, faults=[wait]) as training:
        training.wait_until_injected(wait)
        training.send_signal(number)
        training.resume_waiting()
        assert training.end() == 75, training.output()
        (line,) = training.error_lines()
        assert number.name in line and "from step 14 (0 steps lost)" in line
    assert_saved_by(training, number.name, 14)
    train(load_recipe(small))
    assert event_steps(training.run, "start", "resume") == [0, 14]
    assert_same_run(training.run, reference_run)


def test_first_ctrl_c_saves_and_the_run_resumes_at_that_step(
    small: Path, work_dir: Path, reference_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wait = fault_in_batch(load_recipe(small), "wait", 13, 3)
    with start_training(small, work_dir, faults=[wait]) as training:
        press_ctrl_c(training, wait, 14)
        assert training.end() == INTERRUPTED_STATUS, training.output()
        (line,) = training.error_lines()
        assert "Ctrl-C" in line and "from step 14 (0 steps lost)" in line
    assert newest_step(training.run) == 14
    assert (read_events(training.run)[-1]["event"], event_steps(training.run)[-1]) == ("interrupted", 14)
    train(load_recipe(small))
    assert "resuming from step 14 of 40" in capfd.readouterr().err
    assert_same_run(training.run, reference_run)


def test_second_ctrl_c_aborts_without_waiting_for_the_checkpoint(small: Path, work_dir: Path) -> None:
    saving: Fault = {"do": "wait", "file": "checkpoints/step-00000010/state.json", "until": "never"}
    wait = fault_in_batch(load_recipe(small), "wait", 13, 3)
    with start_training(small, work_dir, faults=[saving, wait]) as training:
        training.wait_until_injected(saving)
        press_ctrl_c(training, wait, 14)
        training.wait_until(lambda: has_metrics(training.run, 14), "the end of the step")
        training.send_signal(signal.SIGINT)
        assert training.end() == INTERRUPTED_STATUS, training.output()
        (line,) = training.error_lines()
        assert "from step 0 (14 steps lost)" in line
    assert RunDir(training.run).checkpoints() == []
    assert read_events(training.run)[-1]["event"] == "interrupted"


def test_ctrl_c_in_the_last_step_saves_and_a_rerun_finishes_the_run(small: Path, work_dir: Path) -> None:
    wait = fault_in_batch(load_recipe(small), "wait", 39, 3)
    with start_training(small, work_dir, faults=[wait]) as training:
        press_ctrl_c(training, wait, 40)
        assert training.end() == INTERRUPTED_STATUS, training.output()
        (line,) = training.error_lines()
        assert "Ctrl-C" in line and "resumes" not in line
    assert newest_step(training.run) == 40
    assert read_events(training.run)[-1]["event"] == "interrupted"
    train(load_recipe(small))
    assert read_events(training.run)[-1]["event"] == "done"


def test_signal_during_a_checkpoint_completes_it_and_saves_another(small: Path, work_dir: Path) -> None:
    saving: Fault = {"do": "wait", "file": "checkpoints/step-00000010/state.json", "until": "saved"}
    wait = fault_in_batch(load_recipe(small), "wait", 13, 3)
    with start_training(small, work_dir, faults=[saving, wait]) as training:
        training.wait_until_injected(saving)
        training.wait_until_injected(wait)
        training.send_signal(signal.SIGTERM)
        training.resume_waiting()
        training.wait_until(lambda: has_metrics(training.run, 14), "the end of the step")
        assert RunDir(training.run).checkpoints() == []
        (work_dir / "saved").touch()
        assert training.end() == 75, training.output()
    checkpoints = RunDir(training.run).checkpoints()
    assert [(checkpoint.step, checkpoint.find_damage()) for checkpoint in checkpoints] == [(10, []), (14, [])]
    assert_saved_by(training, "SIGTERM", 14)


def test_signal_to_one_rank_or_to_torchrun_saves_on_all(
    small: Path, tmp_path: Path, reference_run_2_ranks: Path
) -> None:
    first, second = (fault_in_batch(load_recipe(small), "wait", *place) for place in ((13, 4), (24, 1)))
    with start_training(small, tmp_path, ranks=2, faults=[first]) as training:
        training.wait_until_injected(first)
        os.kill(training.workers()[1], signal.SIGUSR1)
        training.resume_waiting()
        assert training.end() == 1  # torchrun's own status
    assert_saved_by(training, "a signal to another rank", 14)
    (tmp_path / "go").unlink()
    with start_training(small, tmp_path, ranks=2, faults=[second]) as training:
        press_ctrl_c(training, second, 25)
        training.end()
        line = training.error_lines()[-1]
        assert "Ctrl-C" in line and "from step 25 (0 steps lost)" in line
    assert newest_step(training.run) == 25
    train_to_end(small, tmp_path, ranks=2)
    assert_same_run(training.run, reference_run_2_ranks)


# Full disks: a checkpoint of these runs takes 2.0 MB, and three exist while two are kept


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mount_small_disk(tmp_path_factory.mktemp("mounts") / "disk", "12m") as place:
        yield place


def fill(disk: Path, free_megabytes: float) -> Path:
    """Fill a disk except for some space; return the file that takes the rest."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with filler.open("wb") as file:
        file.write(bytes(int(free - free_megabytes * 1e6)))
    return filler


def link_checkpoints(disk: Path, folder: Path) -> Path:
    """Make a run in `folder` keep its checkpoints on `disk`; return the run's folder."""
    run = folder / "runs/small"
    run.mkdir(parents=True)
    (run / "checkpoints").symlink_to(disk)
    (disk / ".used-by").write_text(f"{run.resolve()}\n")  # as training writes it into an empty folder
    return run


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_full_disk_stops_the_run_which_resumes_after_space_is_freed(
    small: Path,
    work_dir: Path,
    disk: Path,
    reference_run: Path,
    capfd: pytest.CaptureFixture[str],
    asynchronous: str,
) -> None:
    run, filler = link_checkpoints(disk, work_dir), fill(disk, 5)
    command = ["train", str(small / "recipe.yaml"), "--checkpoint.asynchronous", asynchronous]
    assert cli.main(command) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tinyllama: ")]
    assert re.search(r"checkpoint of step 30 .*No space left on device.*free some space", line)
    lost = read_metrics(run)[-1]["step"] - 20  # training continues while a checkpoint is written
    assert f"from step 20 ({lost} steps lost)" in line
    assert event_steps(run, "checkpoint", "checkpoint-failed") == [10, 20, 30]
    assert "No space left" in read_events(run)[-1]["problem"]
    assert newest_step(run) == 20
    assert not (run / "checkpoints/step-00000030").exists()
    filler.unlink()
    assert cli.main(command) == 0
    assert_same_run(run, reference_run)


def test_run_with_on_failure_continue_saves_again_after_space_is_freed(
    small: Path, work_dir: Path, disk: Path, reference_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, filler = link_checkpoints(disk, work_dir), fill(disk, 3)
    event = RunLog.event

    def free_space(self: RunLog, name: str, step: int, **details: Any) -> None:
        event(self, name, step, **details)
        if (name, step) == ("checkpoint-failed", 30):
            filler.unlink()

    monkeypatch.setattr(RunLog, "event", free_space)
    train(load_recipe(small, **{"checkpoint.on_failure": "continue"}))
    assert event_steps(run, "checkpoint") == [10, 40]
    assert event_steps(run, "checkpoint-failed") == [20, 30]
    assert [checkpoint.step for checkpoint in RunDir(run).checkpoints()] == [10, 40]
    assert_same_run(run, reference_run)


def test_run_without_its_last_checkpoint_is_not_finished(
    small: Path, work_dir: Path, disk: Path, reference_run: Path
) -> None:
    run, filler = link_checkpoints(disk, work_dir), fill(disk, 5)
    command = ["train", str(small / "recipe.yaml"), "--checkpoint.on_failure", "continue"]
    assert cli.main(command) == 1
    assert event_steps(run, "checkpoint-failed") == [30, 40]
    assert newest_step(run) == 20
    filler.unlink()
    assert cli.main(command) == 0
    assert_same_run(run, reference_run)


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_disk_without_a_free_byte_ends_the_run_and_loses_nothing(
    small: Path, disk: Path, work_dir: Path, reference_run: Path, monkeypatch: pytest.MonkeyPatch, on_failure: str
) -> None:
    """metrics.jsonl is on the full disk too, and no step may lack its row."""
    wait = fault_in_batch(load_recipe(small), "wait", 13, 3)
    with start_training(small, disk, "--checkpoint.on_failure", on_failure, faults=[wait]) as training:
        training.wait_until_injected(wait)
        training.resume_waiting()  # its file needs space
        filler = fill(disk, 0)
        assert training.end() in (1, 2), training.output()
        (line,) = training.error_lines()
        assert "No space left on device" in line
        assert "Traceback" not in training.output()
    filler.unlink()
    assert newest_step(training.run) == 10
    monkeypatch.chdir(disk)
    train(load_recipe(small, **{"checkpoint.on_failure": on_failure}))
    assert_same_run(training.run, reference_run)


def test_committed_checkpoint_stays_if_its_event_cannot_be_written(
    small: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `keep: 1` the previous one is deleted by then: the checkpoint is all that is left of the run."""
    event = RunLog.event

    def without_space(self: RunLog, name: str, step: int, **details: Any) -> None:
        if name.startswith("checkpoint") and step == 20:
            raise OSError(28, "No space left on device")
        event(self, name, step, **details)

    monkeypatch.setattr(RunLog, "event", without_space)
    with pytest.raises((OSError, RuntimeError)):
        train(load_recipe(small, **{"checkpoint.keep": 1}))
    assert newest_step(work_dir / "runs/small") == 20
