"""Faults of machines, for real: ranks killed and stopped, signals, disks that are full."""

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
from tests.train.launching import (
    Life,
    events_of,
    fault,
    finish,
    has_rows,
    launched,
    losses_of,
    rows_of,
    same_weights,
    small_disk,
    weights,
    without_space,
)
from tests.train.planting import Fault, plant_in_losses
from tests.train.trainers import recipe_of

from tinyllama import cli
from tinyllama.runs import checkpoint
from tinyllama.runs.log import RunLog
from tinyllama.train.loop import train

pytest_plugins = ["tests.train.fixtures"]
pytestmark = pytest.mark.slow


def newest_whole_step(run: Path) -> int:
    """The newest committed checkpoint's step; that it is whole is asserted."""
    newest = checkpoint.list_committed(run)[-1]
    assert checkpoint.find_damage(newest) == []
    return checkpoint.step_of(newest)


def decisions(run: Path) -> list[tuple[str, int, Any, Any]]:
    """What happened at which step, without what is measured."""
    return [(row["event"], row["step"], row.get("checkpoint"), row.get("skipped_batches")) for row in events_of(run)]


# The guard on several ranks


def test_a_bad_row_on_one_rank_is_the_same_decision_on_both_and_on_one_process(
    small: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(small, **{"guard.spike_window_steps": 8})
    # Of six rows the first three are rank 0's.
    bad = [fault(recipe, "nan", 3, 5), fault(recipe, "infinite", 5, 0), fault(recipe, "spike", 17, 4)]
    run = finish(small, here / "two", "--guard.spike_window_steps", "8", ranks=2, faults=bad)
    judged = [[json.loads(line) for line in (here / f"two/judged-{rank}.jsonl").open()] for rank in range(2)]
    assert judged[0] == judged[1]
    verdicts = [(number, verdict[2]) for number, verdict in enumerate(judged[0]) if verdict[2] != "apply"]
    assert verdicts == [(3, "skip"), (5, "skip"), (17, "roll back")]
    plant_in_losses(bad, monkeypatch.setattr)
    alone = train(recipe)
    assert decisions(run) == decisions(alone)
    skips = [(row["step"], row["loss"], "skipped" in row) for row in rows_of(run) if "skipped" in row]
    assert skips == [(4, None, True), (6, None, True)]
    losses, expected = ([loss for _, loss in losses_of(which) if loss] for which in (run, alone))
    assert losses == pytest.approx(expected, rel=1e-5)
    ours, theirs = weights(run), weights(alone)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


# Processes that die or hang


def test_a_killed_rank_comes_back_by_itself_also_where_it_was_saving(
    small: Path, tmp_path: Path, calm_pair: Path
) -> None:
    recipe = recipe_of(small)
    deaths: list[Fault] = [
        fault(recipe, "kill", 13, 5),
        {"do": "kill", "file": "checkpoints/step-00000020/__1_0.distcp"},
        {"do": "kill", "file": "checkpoints/step-00000030/commit.json"},
    ]
    run = finish(small, tmp_path, ranks=2, faults=deaths, options=["--max-restarts=3"])
    assert len(list(tmp_path.glob("struck-*"))) == len(deaths)
    assert [row["step"] for row in events_of(run, "start", "resume")] == [0, 10, 10, 20]
    assert losses_of(run) == losses_of(calm_pair)
    assert same_weights(run, calm_pair)


def test_a_rank_that_stands_still_is_an_event_and_is_started_again(
    small: Path, tmp_path: Path, calm_pair: Path
) -> None:
    stop = fault(recipe_of(small), "stop", 13, 4)
    # More restarts than one, for a machine so busy that a step takes as long.
    flags, options = ("--guard.watchdog_seconds", "8"), ["--max-restarts=4"]
    with launched(small, tmp_path, *flags, ranks=2, faults=[stop], options=options) as life:
        life.wait_until_struck(stop)
        stopped = life.workers()[1]
        life.wait_until(lambda: bool(events_of(life.run, "hang")), "a hang was noticed")
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)  # torchrun does it itself, after 30 s
        assert life.end() == 0, life.said()
    hangs = [(row["step"], row["rank"], row["seconds"]) for row in events_of(life.run, "hang")]
    assert (14, 0, 8.0) in hangs
    assert losses_of(life.run) == losses_of(calm_pair)
    assert same_weights(life.run, calm_pair)


# Signals


def assert_saved_by(life: Life, name: str, step: int) -> None:
    """It ended saying that it saved at a step, and did."""
    assert newest_whole_step(life.run) == step == rows_of(life.run)[-1]["step"]
    last = events_of(life.run)[-1]
    assert (last["event"], last["step"], last["signal"]) == ("signal", step, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_the_status_for_requeueing(
    small: Path, here: Path, calm: Path, number: signal.Signals
) -> None:
    wait = fault(recipe_of(small), "wait", 13, 3)
    with launched(small, here, faults=[wait]) as life:
        life.wait_until_struck(wait)
        life.process.send_signal(number)
        life.go()
        assert life.end() == 75, life.said()
        said = f"tinyllama: {number.name}: saved at step 14; the same command goes on from there"
        assert life.complaints() == [said]
    assert_saved_by(life, number.name, 14)
    train(recipe_of(small))
    assert [row["step"] for row in events_of(life.run, "start", "resume")] == [0, 14]
    assert losses_of(life.run) == losses_of(calm)
    assert same_weights(life.run, calm)


def test_a_signal_while_a_checkpoint_is_written_finishes_that_one_and_saves_another_of_the_step(
    small: Path, here: Path
) -> None:
    saving: Fault = {"do": "wait", "file": "checkpoints/step-00000010/state.json", "until": "saved"}
    wait = fault(recipe_of(small), "wait", 13, 3)
    with launched(small, here, faults=[saving, wait]) as life:
        life.wait_until_struck(saving)
        life.wait_until_struck(wait)
        life.process.send_signal(signal.SIGTERM)
        life.go()
        life.wait_until(lambda: has_rows(life.run, 14), "the step under way was done")
        assert checkpoint.list_committed(life.run) == []
        (here / "saved").touch()
        assert life.end() == 75, life.said()
    whole = checkpoint.list_committed(life.run)
    assert [(checkpoint.step_of(folder), checkpoint.find_damage(folder)) for folder in whole] == [(10, []), (14, [])]
    assert_saved_by(life, "SIGTERM", 14)


def test_signals_to_one_rank_or_to_torchrun_save_on_all_and_the_run_goes_on_the_same(
    small: Path, tmp_path: Path, calm_pair: Path
) -> None:
    first, second = fault(recipe_of(small), "wait", 13, 4), fault(recipe_of(small), "wait", 24, 1)
    with launched(small, tmp_path, ranks=2, faults=[first]) as life:
        life.wait_until_struck(first)
        signal_worker(life, 1, signal.SIGUSR1)
        life.go()
        assert life.end() == 1  # torchrun's own
    assert_saved_by(life, "a signal to another rank", 14)
    (tmp_path / "go").unlink()
    with launched(small, tmp_path, ranks=2, faults=[second]) as life:
        life.wait_until_struck(second)
        life.process.send_signal(signal.SIGTERM)
        life.go()
        life.end()
    assert_saved_by(life, "SIGTERM", 25)
    finish(small, tmp_path, ranks=2)
    assert losses_of(life.run) == losses_of(calm_pair)
    assert same_weights(life.run, calm_pair)


def signal_worker(life: Life, rank: int, number: signal.Signals) -> None:
    os.kill(life.workers()[rank], number)


# Disks that are full: a checkpoint of these runs takes 2.0 MB, and three are there while two are kept


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if without_space():
        pytest.skip("needs a mount namespace for a disk that is full")
    with small_disk(tmp_path_factory.mktemp("mounts") / "disk", "12m") as place:
        yield place


def fill(disk: Path, free_megabytes: float) -> Path:
    """Leave so much room on a disk; return the file that takes the rest."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with filler.open("wb") as file:
        file.write(bytes(int(free - free_megabytes * 1e6)))
    return filler


def link_checkpoints(disk: Path, folder: Path) -> Path:
    """Have a run in `folder` keep its checkpoints on `disk`."""
    run = folder / "runs/small"
    run.mkdir(parents=True)
    (run / "checkpoints").symlink_to(disk)
    (disk / ".used-by").write_text(f"{run.resolve()}\n")  # as training writes it where the folder is empty
    return run


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_where_a_full_disk_shall_stop_the_run_it_keeps_its_last_checkpoint_and_goes_on_when_there_is_room(
    small: Path, here: Path, disk: Path, calm: Path, capfd: pytest.CaptureFixture[str], asynchronous: str
) -> None:
    run, filler = link_checkpoints(disk, here), fill(disk, 5)
    command = ["train", str(small / "recipe.yaml"), "--checkpoint.asynchronous", asynchronous]
    assert cli.main(command) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tinyllama: ")]
    assert len(said) == 1
    assert re.search(r"the checkpoint of step 30 cannot be written \(.*No space left on device.*\); make room", said[0])
    assert [row["step"] for row in events_of(run, "checkpoint", "checkpoint-failed")] == [10, 20, 30]
    assert "No space left" in events_of(run)[-1]["problem"]
    assert newest_whole_step(run) == 20
    assert not (run / "checkpoints/step-00000030").exists()
    filler.unlink()
    assert cli.main(command) == 0
    assert losses_of(run) == losses_of(calm)
    assert same_weights(run, calm)


def test_where_a_full_disk_shall_not_stop_the_run_it_goes_on_and_saves_again_when_there_is_room(
    small: Path, here: Path, disk: Path, calm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, filler = link_checkpoints(disk, here), fill(disk, 3)
    event = RunLog.event

    def make_room(self: RunLog, name: str, step: int, **details: Any) -> None:
        event(self, name, step, **details)
        if (name, step) == ("checkpoint-failed", 30):
            filler.unlink()

    monkeypatch.setattr(RunLog, "event", make_room)
    train(recipe_of(small, **{"checkpoint.on_failure": "continue"}))
    saves = [(row["event"], row["step"]) for row in events_of(run, "checkpoint", "checkpoint-failed")]
    assert saves == [("checkpoint", 10), ("checkpoint-failed", 20), ("checkpoint-failed", 30), ("checkpoint", 40)]
    assert [folder.name for folder in checkpoint.list_committed(run)] == ["step-00000010", "step-00000040"]
    assert losses_of(run) == losses_of(calm)
    assert same_weights(run, calm)


def test_a_run_whose_last_checkpoint_cannot_be_written_is_not_taken_for_finished(
    small: Path, here: Path, disk: Path, calm: Path
) -> None:
    run, filler = link_checkpoints(disk, here), fill(disk, 5)
    command = ["train", str(small / "recipe.yaml"), "--checkpoint.on_failure", "continue"]
    assert cli.main(command) == 1
    assert [row["step"] for row in events_of(run, "checkpoint-failed")] == [30, 40]
    assert newest_whole_step(run) == 20
    filler.unlink()
    assert cli.main(command) == 0
    assert losses_of(run) == losses_of(calm)
    assert same_weights(run, calm)


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_disk_without_a_byte_left_ends_the_run_with_one_line_and_loses_nothing(
    small: Path, disk: Path, here: Path, calm: Path, monkeypatch: pytest.MonkeyPatch, on_failure: str
) -> None:
    """metrics.jsonl lies on the full disk too, and no step may be without its row."""
    wait = fault(recipe_of(small), "wait", 13, 3)
    flags = ("--checkpoint.on_failure", on_failure)
    with launched(small, disk, *flags, faults=[wait]) as life:
        life.wait_until_struck(wait)
        life.go()  # before there is no room for that file
        filler = fill(disk, 0)
        assert life.end() in (1, 2), life.said()
        assert len(life.complaints()) == 1, life.said()
        assert "No space left on device" in life.complaints()[0]
        assert "Traceback" not in life.said()
    filler.unlink()
    assert newest_whole_step(life.run) == 10
    monkeypatch.chdir(disk)
    train(recipe_of(small, **{"checkpoint.on_failure": on_failure}))
    assert losses_of(life.run) == losses_of(calm)
    assert same_weights(life.run, calm)


def test_a_committed_checkpoint_stays_although_its_event_cannot_be_written(
    small: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one kept, the one before is gone by then: it is all that there is of the run."""
    event = RunLog.event

    def without_room(self: RunLog, name: str, step: int, **details: Any) -> None:
        if name.startswith("checkpoint") and step == 20:
            raise OSError(28, "No space left on device")
        event(self, name, step, **details)

    monkeypatch.setattr(RunLog, "event", without_room)
    with pytest.raises((OSError, RuntimeError)):
        train(recipe_of(small, **{"checkpoint.keep": 1}))
    assert newest_whole_step(here / "runs/small") == 20
