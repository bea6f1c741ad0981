"""Exactness on several ranks: killed whenever and however, a run ends with the weights of one that never was."""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
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
)
from tests.train.planting import Fault

from tinyllama.recipe import Recipe
from tinyllama.runs import checkpoint
from tinyllama.train.loop import train

pytest_plugins = ["tests.train.fixtures"]
pytestmark = pytest.mark.slow


def kill_one_rank(life: Life) -> None:
    os.kill(life.workers().get(1, life.process.pid), signal.SIGKILL)


def kill_all_ranks(life: Life) -> None:
    for worker in life.workers().values():
        os.kill(worker, signal.SIGKILL)


def kill_the_launcher(life: Life) -> None:
    life.process.kill()


def wait_for_orphans(life: Life) -> None:
    """Wait until none of a life's ranks is there any more."""
    deadline = time.monotonic() + 30
    while left := life.workers():
        assert time.monotonic() < deadline, f"ranks {sorted(left)} train on without their launcher"
        time.sleep(0.01)


def test_killed_in_any_way_at_any_moment_it_ends_with_the_same_weights(
    small: Path, tmp_path: Path, calm_pair: Path
) -> None:
    chance = random.Random(11)
    slow: Fault = {"do": "slow", "seconds": 0.01}  # so that the kills find it at work
    for number, kill in enumerate((kill_one_rank, kill_all_ranks, kill_the_launcher)):
        with launched(small, tmp_path, ranks=2, faults=[slow]) as life:
            # Not before it has got somewhere, then within about a checkpoint's time.
            goal = number * 10 + chance.randrange(1, 10)
            life.wait_until(partial(has_rows, life.run, goal), f"step {goal}")
            time.sleep(chance.random() * 0.3)
            kill(life)
            life.end()
            wait_for_orphans(life)
    run = finish(small, tmp_path, ranks=2)
    assert losses_of(run) == losses_of(calm_pair)
    assert same_weights(run, calm_pair)


def test_no_rank_outlives_its_launcher(small: Path, tmp_path: Path) -> None:
    """Or it would train on beside the run's next life, or keep that from starting."""
    wait = fault(Recipe.load(small / "recipe.yaml"), "wait", 13, 1)
    with launched(small, tmp_path, ranks=2, faults=[wait]) as life:
        life.wait_until_struck(wait)
        assert sorted(life.workers()) == [0, 1]
        life.process.kill()
        life.end()
        wait_for_orphans(life)
    assert rows_of(life.run)[-1]["step"] == 13


@pytest.mark.parametrize("file", ["__0_0.distcp", "state.json", "commit.json"])
def test_a_checkpoint_half_written_is_never_resumed_from(small: Path, here: Path, calm: Path, file: str) -> None:
    death: Fault = {"do": "kill", "file": f"checkpoints/step-00000020/{file}"}
    with launched(small, here, faults=[death]) as life:
        assert life.end() == -signal.SIGKILL, life.said()
    half = life.run / "checkpoints/step-00000020"
    assert any(path.name.startswith(file) for path in half.iterdir())
    assert not (half / checkpoint.COMMIT).exists()
    train(Recipe.load(small / "recipe.yaml"))
    assert [row["step"] for row in events_of(life.run, "start", "resume")] == [0, 10]
    assert losses_of(life.run) == losses_of(calm)
    assert same_weights(life.run, calm)


def test_killed_in_the_middle_of_a_row_each_step_stands_once(small: Path, here: Path, calm: Path) -> None:
    death: Fault = {"do": "tear", "step": 14}
    with launched(small, here, faults=[death]) as life:
        assert life.end() == -signal.SIGKILL, life.said()
    assert not (life.run / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert rows_of(life.run)[-1]["step"] == 13
    train(Recipe.load(small / "recipe.yaml"))
    assert [row["step"] for row in rows_of(life.run)] == list(range(1, 41))
    assert losses_of(life.run) == losses_of(calm)
    assert same_weights(life.run, calm)


def test_an_event_cut_in_the_middle_is_forgotten_also_beside_a_damaged_checkpoint(
    small: Path, here: Path, calm: Path
) -> None:
    recipe = Recipe.load(small / "recipe.yaml")
    run = train(recipe)
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'{"time": 17, "ev')
    with (checkpoint.list_committed(run)[-1] / "state.json").open("ab") as file:
        file.write(b" ")
    train(recipe)
    assert [row["event"] for row in events_of(run)][-4:] == ["checkpoint-damaged", "resume", "checkpoint", "done"]
    assert losses_of(run) == losses_of(calm)
    assert same_weights(run, calm)
