"""The guard: what is skipped, what goes back, and that the run then is the one that never met the bad batches."""

import json
import math
import re
import statistics
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.test_store_at_size import write_store
from tests.train.launching import events_of, fault, launched, losses_of, rows_of, same_weights, weights
from tests.train.planting import plant_in_losses

from tinyllama import cli
from tinyllama.data import batches as batches_module
from tinyllama.data.batches import batch_index_for_step, batch_of_step, batches
from tinyllama.data.store import TokenStore
from tinyllama.errors import RunStoppedError
from tinyllama.files import write_json
from tinyllama.recipe import Guard, Recipe
from tinyllama.runs import checkpoint
from tinyllama.train.guard import Action, SpikeDetector, all_skipped_batches, is_spike, read_rollbacks, record_rollback
from tinyllama.train.loop import train

pytest_plugins = ["tests.train.fixtures"]

WINDOW = {"guard.spike_window_steps": 8}


def rules(**fields: Any) -> Guard:
    return Guard(**{"spike_window_steps": 8, "max_skips": 2, **fields})


def recipe_of(small: Path, **overrides: Any) -> Recipe:
    return Recipe.load(small / "recipe.yaml", WINDOW | overrides)


# The decision


def test_a_spike_is_seen_only_when_the_window_is_full() -> None:
    window = [5.0, 5.1, 4.9, 5.0, 5.1, 4.9, 5.0]
    assert not is_spike(1000.0, window, rules())
    assert is_spike(1000.0, [*window, 5.0], rules())


def test_a_loss_is_a_spike_from_so_many_standard_deviations_on() -> None:
    window = [4.0, 4.2, 4.4, 4.6, 5.4, 5.6, 5.8, 6.0]  # the median is 5, and half of them are farther than 0.7 from it
    deviation = 1.4826 * 0.7
    assert not is_spike(5 + 5.99 * deviation, window, rules())
    assert is_spike(5 + 6.01 * deviation, window, rules())
    assert not is_spike(5 + 6.01 * deviation, window, rules(spike_z_score=7))


def test_equal_losses_leave_room_of_a_hundredth_a_standard_deviation() -> None:
    assert not is_spike(5 * 1.059, [5.0] * 8, rules())
    assert is_spike(5 * 1.061, [5.0] * 8, rules())


@given(st.lists(st.floats(0, 20), min_size=8, max_size=8), st.floats(-100, 20))
def test_no_loss_up_to_the_median_is_ever_a_spike(window: list[float], loss: float) -> None:
    assert not is_spike(min(loss, statistics.median(window)), window, rules())


def test_skips_in_a_row_are_counted_and_one_too_many_goes_back_by_all_their_batches() -> None:
    guard = SpikeDetector(rules())
    assert guard.check(math.nan, 1.0)[::2] == (Action.SKIP, 1)
    assert guard.check(5.0, math.inf)[::2] == (Action.SKIP, 2)
    assert guard.check(-math.inf, math.nan)[::2] == (Action.ROLL_BACK, 3)


def test_a_step_that_is_well_ends_the_row_of_skips() -> None:
    guard = SpikeDetector(rules())
    for _ in range(5):
        assert guard.check(math.nan, 1.0)[0] is Action.SKIP
        assert guard.check(1.0, math.inf)[0] is Action.SKIP
        assert guard.check(5.0, 1.0) == (Action.APPLY, "", 0)


def test_without_skips_the_first_that_is_not_finite_goes_back() -> None:
    verdict, reason, blamed = SpikeDetector(rules(max_skips=0)).check(5.0, math.inf)
    assert (verdict, blamed) == (Action.ROLL_BACK, 1)
    assert reason == "loss 5.0, gradient norm inf"


def test_losses_that_were_not_learnt_from_are_not_in_the_window() -> None:
    guard = SpikeDetector(rules())
    for number in range(8):
        guard.check(5.0 + number / 100, 1.0)
    before = guard.state()["losses"]
    assert guard.check(math.nan, 1.0)[0] is Action.SKIP
    assert guard.check(5.0, math.inf)[0] is Action.SKIP
    assert guard.check(99.0, 1.0)[::2] == (Action.ROLL_BACK, 2)
    assert guard.state()["losses"] == before
    guard.check(5.05, 1.0)
    assert guard.state()["losses"] == [*before[1:], 5.05]


@given(st.lists(st.floats(0.1, 20) | st.just(math.nan), max_size=30), st.floats(0.1, 40))
def test_a_guard_from_a_checkpoint_decides_as_the_one_that_made_it(losses: list[float], then: float) -> None:
    guard = SpikeDetector(rules())
    for loss in losses:
        guard.check(loss, 1.0)
    other = SpikeDetector(rules(), json.loads(json.dumps(guard.state())))
    assert (list(other.losses), other.skips) == (list(guard.losses), guard.skips)
    for loss in (then, math.nan, then / 2, 5.0):
        assert other.check(loss, 1.0) == guard.check(loss, 1.0)
        assert other.state() == guard.state()


# The batches that are left out


@given(st.integers(0, 60), st.sets(st.integers(0, 80), max_size=40))
def test_a_step_learns_from_the_batch_that_so_many_others_precede(step: int, left_out: set[int]) -> None:
    kept = [batch for batch in range(200) if batch not in left_out]
    assert batch_index_for_step(step, left_out) == kept[step]


@pytest.mark.parametrize(("first_step", "ranks"), [(0, 1), (0, 2), (3, 3), (9, 1), (10, 1)])
def test_batches_left_out_are_passed_over_and_the_steps_stay_as_many(
    small: Path, monkeypatch: pytest.MonkeyPatch, first_step: int, ranks: int
) -> None:
    recipe, store = recipe_of(small, **{"train.tokens": 10 * 6 * 64}), TokenStore.open(small / "store")
    monkeypatch.setattr(batches_module, "_MAX_BLOCK_SEQUENCES", 6 * 3)  # so that there are several blocks
    left_out = {0, 3, 4, 5, 6, 11, 12, 99}
    learnt = [1, 2, 7, 8, 9, 10, 13, 14, 15, 16][first_step:]
    for rank in range(ranks):
        read = list(batches(recipe, store, first_step, rank, ranks, left_out))
        assert len(read) == len(learnt) == 10 - first_step
        for batch, rows in zip(learnt, read, strict=True):
            assert torch.equal(rows, batch_of_step(recipe, store, batch, rank, ranks))


def test_no_token_of_a_batch_left_out_is_read(small: Path, tmp_path: Path) -> None:
    """Token = index: what the batches hold says itself where it was read."""
    sizes = {"modules": [30_000], "lines": [20_000]}
    folder = write_store(tmp_path / "store", sizes)
    for source, first in (("modules", 0), ("lines", 40_000)):
        np.arange(first, first + sizes[source][0], dtype="<u2").tofile(folder / source / "train/00000.tokens")
    recipe, store = recipe_of(small, **{"train.tokens": 20 * 6 * 64}), TokenStore.open(folder)
    left_out = {0, 7, 8, 19}
    skipped = {int(row[0]) for batch in left_out for row in batch_of_step(recipe, store, batch)}
    starts = [int(row[0]) for rows in batches(recipe, store, 0, skipped_batches=left_out) for row in rows]
    assert len(starts) == len(set(starts)) == 20 * 6
    assert not skipped & set(starts)
    assert skipped | set(starts) == {int(row[0]) for batch in range(24) for row in batch_of_step(recipe, store, batch)}


def test_what_is_left_out_adds_up_in_its_file(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    first = {"batches": [3, 4], "checkpoint": 0, "step": 5, "reason": "loss nan"}
    second = {"batches": [7], "checkpoint": 5, "step": 6, "reason": "loss inf"}
    record_rollback(tmp_path, first)
    record_rollback(tmp_path, second)
    assert read_rollbacks(tmp_path) == [first, second]
    assert all_skipped_batches([first, second]) == {3, 4, 7}


# A run


@pytest.fixture
def plant(small: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plant faults of one kind at a row of each of some batches."""

    def planting(what: str, *struck: int) -> None:
        plant_in_losses([fault(recipe_of(small), what, batch, 4) for batch in struck], monkeypatch.setattr)

    return planting


def trained_without(small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *left_out: int, **fields: Any) -> Path:
    """A run from scratch, to which nothing happens, that leaves out some batches from its beginning."""
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        record = {"batches": list(left_out), "checkpoint": 0, "step": 0, "reason": "by hand"}
        write_json(folder / "runs/small/skipped_batches.json", [record])
        return folder / train(recipe_of(small, **fields))


def assert_finite(run: Path) -> None:
    assert all(bool(tensor.isfinite().all()) for tensor in weights(run).values())


@pytest.mark.parametrize(("what", "reason"), [("nan", "loss nan"), ("infinite", "gradient norm (inf|nan)")])
def test_a_step_that_is_not_finite_is_skipped_and_the_run_goes_on(
    small: Path, here: Path, plant: Any, what: str, reason: str
) -> None:
    plant(what, 12)
    run = train(recipe_of(small))
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["step"] for row in rows if row["loss"] is None or "skipped" in row] == [13]
    assert rows[12]["loss"] is rows[12]["gradient_norm"] is None
    assert [(row["step"], row["reason"]) for row in events_of(run, "skip")] == [(13, rows[12]["skipped"])]
    assert re.search(reason, rows[12]["skipped"])
    assert {row["event"] for row in events_of(run)} == {"start", "checkpoint", "skip", "done"}
    assert rows[-1]["loss"] < rows[11]["loss"]
    assert_finite(run)


def test_a_skipped_step_changes_no_weight(small: Path, here: Path, plant: Any) -> None:
    fields = {"train.tokens": 3 * 6 * 64, "checkpoint.every_steps": 1, "checkpoint.keep": 3}
    plant("nan", 1, 2)
    run = train(recipe_of(small, **fields))
    first, *others = (checkpoint.checkpoint_folder(run, step) for step in (1, 2, 3))
    assert same_weights(first, others[0])
    assert same_weights(first, others[1])


@pytest.mark.parametrize("what", ["nan", "infinite"])
def test_skips_without_end_go_back_to_the_last_checkpoint_and_leave_their_batches_out(
    small: Path, here: Path, plant: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    plant(what, 23, 24, 25, 26)
    run = here / train(recipe_of(small, **{"guard.max_skips": 2}))
    # The fourth comes again in the step where the first was, and alone it is a skip like any other.
    assert [row["step"] for row in events_of(run, "skip")] == [24, 25, 24]
    rollback = events_of(run, "rollback")[0]
    assert (rollback["step"], rollback["checkpoint"], rollback["skipped_batches"]) == (26, 20, [23, 24, 25])
    record = {key: rollback[key] for key in ("step", "checkpoint", "reason")}
    assert read_rollbacks(run) == [record | {"batches": [23, 24, 25]}]
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row.get("batch") for row in rows] == [None] * 20 + [20, 21, 22, *range(26, 43)]
    assert [row["step"] for row in rows if row["loss"] is None] == [24]
    assert_finite(run)
    other = trained_without(small, here / "other", monkeypatch, 23, 24, 25)
    assert same_weights(run, other)


def test_after_a_spike_the_run_is_the_one_that_never_met_it(
    small: Path, here: Path, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("spike", 27)
    run = here / train(recipe_of(small))
    rollback = events_of(run, "rollback")[0]
    assert (rollback["step"], rollback["checkpoint"], rollback["skipped_batches"]) == (28, 20, [26, 27])
    assert rollback["reason"].startswith("loss ")
    assert [(row["event"], row["step"]) for row in events_of(run, "start", "resume")] == [("start", 0), ("resume", 20)]
    assert [row["batch"] for row in rows_of(run)[20:]] == [*range(20, 26), *range(28, 42)]
    other = trained_without(small, here / "other", monkeypatch, 26, 27)
    assert losses_of(run) == losses_of(other)
    assert same_weights(run, other)


def test_a_batch_from_before_the_checkpoint_is_never_left_out(
    small: Path, here: Path, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("spike", 20)
    run = here / train(recipe_of(small))
    assert [row["skipped_batches"] for row in events_of(run, "rollback")] == [[20]]
    assert same_weights(run, trained_without(small, here / "other", monkeypatch, 20))


def test_before_the_first_checkpoint_it_goes_back_to_the_first_weights(
    small: Path, here: Path, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"checkpoint.every_steps": 100}
    plant("spike", 12)
    run = here / train(recipe_of(small, **fields))
    assert [(row["event"], row["step"]) for row in events_of(run)] == [
        ("start", 0),
        ("rollback", 13),
        ("start", 0),
        ("checkpoint", 40),
        ("done", 40),
    ]
    assert [row["checkpoint"] for row in read_rollbacks(run)] == [0]
    other = trained_without(small, here / "other", monkeypatch, 11, 12, **fields)
    assert losses_of(run) == losses_of(other)
    assert same_weights(run, other)


def test_spikes_at_other_checkpoints_go_back_each_for_itself(
    small: Path, here: Path, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("spike", 15, 25, 36)
    run = here / train(recipe_of(small, **{"guard.max_rollbacks": 1}))
    left_out = [row["skipped_batches"] for row in events_of(run, "rollback")]
    assert left_out == [[14, 15], [24, 25], [35, 36]]
    assert [row["checkpoint"] for row in events_of(run, "rollback")] == [10, 20, 30]
    other = trained_without(small, here / "other", monkeypatch, *chain.from_iterable(left_out))
    assert losses_of(run) == losses_of(other)
    assert same_weights(run, other)


def test_spikes_without_end_end_the_run_with_one_line(
    small: Path, here: Path, plant: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    plant("spike", *range(24, 60))
    flags = ["--guard.spike_window_steps", "8", "--guard.max_rollbacks", "2"]
    assert cli.main(["train", str(small / "recipe.yaml"), *flags]) == 1
    run = Path("runs/small")
    assert [row["checkpoint"] for row in events_of(run, "rollback")] == [20, 20]
    ended = events_of(run)[-1]
    assert (ended["event"], ended["step"]) == ("failed", 22)  # the last step with a row
    assert "step 23: loss" in ended["problem"]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tinyllama: ")]
    assert len(said) == 1
    assert "step 23: loss" in said[0]
    assert "went back to step 20 2 times already" in said[0]
    assert [folder.name for folder in checkpoint.list_committed(run)] == ["step-00000010", "step-00000020"]
    with pytest.raises(RunStoppedError, match="went back to step 20 2 times"):  # nor does it begin anew
        train(recipe_of(small, **{"guard.max_rollbacks": 2}))


def test_killed_after_it_went_back_it_ends_with_the_same_weights(
    small: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(small)
    spike, kill = fault(recipe, "spike", 27, 4), fault(recipe, "kill", 29, 1)
    flags = ("--guard.spike_window_steps", "8")
    with launched(small, here, *flags, faults=[spike, kill]) as life:
        assert life.end() == -9, life.said()
    run = here / "runs/small"
    assert [row["skipped_batches"] for row in events_of(run, "rollback")] == [[26, 27]]
    assert rows_of(run)[-1]["step"] == 27
    train(recipe)
    assert [row["step"] for row in rows_of(run)] == list(range(1, 41))
    other = trained_without(small, here / "other", monkeypatch, 26, 27)
    assert losses_of(run) == losses_of(other)
    assert same_weights(run, other)


# The watchdog

STUCK = """
import sys, time
from tinyllama.train.guard import watchdog
with watchdog(0.5, lambda: print("hung", flush=True)) as alive:
    for _ in range(int(sys.argv[1])):
        time.sleep(0.05)
        alive()
    time.sleep(float(sys.argv[2]))
print("over")
"""


def test_a_process_that_hangs_says_so_and_ends() -> None:
    command = [sys.executable, "-c", STUCK, "3", "100"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (1, "hung\n")
