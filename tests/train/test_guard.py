"""The guard: skipped steps, rollbacks, runs that end as if they had never read the bad batches, and the watchdog."""

import json
import math
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.train import single_process
from tests.train.fault_injection import inject_into_losses
from tests.train.launch import (
    assert_same_run,
    event_steps,
    fault_in_batch,
    load_weights,
    read_events,
    read_metrics,
    same_weights,
    start_training,
)

from tinyllama import cli
from tinyllama.data.batches import batch_index_for_step
from tinyllama.errors import REQUEUE_STATUS, RunStoppedError
from tinyllama.files import write_json
from tinyllama.recipe import Guard, Recipe
from tinyllama.runs.run_dir import RunDir, batches_of
from tinyllama.train.guard import Action, Decision, SpikeDetector, discard_stale_rollbacks, is_spike
from tinyllama.train.loop import train
from tinyllama.train.resume import roll_back

pytest_plugins = ["tests.train.fixtures"]

Inject = Callable[..., None]
Train = Callable[..., Path]
WINDOW = {"guard.spike_window_steps": 8}


def limits(**fields: Any) -> Guard:
    return Guard(**{"spike_window_steps": 8, "max_skips": 2, **fields})


def load_recipe(small: Path, **overrides: Any) -> Recipe:
    return single_process.load_recipe(small, **WINDOW | overrides)


# Decisions


EVEN = [4.0, 4.2, 4.4, 4.6, 5.4, 5.6, 5.8, 6.0]
"""Losses with a median of 5 and a median absolute deviation of 0.7."""
SIGMA = 1.4826 * 0.7


@pytest.mark.parametrize(
    ("loss", "window", "fields", "expected"),
    [
        (1000.0, EVEN[:7], {}, False),  # the window is not full
        (1000.0, EVEN, {}, True),
        (5 + 5.99 * SIGMA, EVEN, {}, False),
        (5 + 6.01 * SIGMA, EVEN, {}, True),
        (5 + 6.01 * SIGMA, EVEN, {"spike_z_score": 7}, False),
        (5 * 1.059, [5.0] * 8, {}, False),  # equal losses count with a standard deviation of 1 %
        (5 * 1.061, [5.0] * 8, {}, True),
    ],
)
def test_spike_threshold_is_a_robust_z_score_over_a_full_window(
    loss: float, window: list[float], fields: dict[str, Any], expected: bool
) -> None:
    assert is_spike(loss, window, limits(**fields)) == expected


@given(st.lists(st.floats(0, 20), min_size=8, max_size=8), st.floats(-100, 20))
def test_no_loss_up_to_the_median_is_a_spike(window: list[float], loss: float) -> None:
    assert not is_spike(min(loss, statistics.median(window)), window, limits())


@pytest.mark.parametrize(
    ("max_skips", "steps", "expected"),
    [
        (2, [(math.nan, 1.0), (5.0, math.inf), (-math.inf, math.nan)], [("skip", 1), ("skip", 2), ("roll back", 3)]),
        (2, [(math.nan, 1.0), (1.0, math.inf), (5.0, 1.0)] * 5, [("skip", 1), ("skip", 2), ("apply", 0)] * 5),
        (0, [(5.0, math.inf)], [("roll back", 1)]),
    ],
)
def test_too_many_skips_in_a_row_roll_back_by_all_their_batches(
    max_skips: int, steps: list[tuple[float, float]], expected: list[tuple[str, int]]
) -> None:
    detector = SpikeDetector(limits(max_skips=max_skips))
    decisions = [detector.check(*step) for step in steps]
    assert [(decision.action.value, decision.num_suspect_batches) for decision in decisions] == expected


def test_losses_that_were_not_applied_are_not_in_the_window() -> None:
    detector = SpikeDetector(limits())
    for number in range(8):
        detector.check(5.0 + number / 100, 1.0)
    before = detector.state()["losses"]
    assert detector.check(math.nan, 1.0).action is Action.SKIP
    assert detector.check(5.0, math.inf).action is Action.SKIP
    spike = detector.check(99.0, 1.0)
    assert (spike.action, spike.num_suspect_batches, spike.is_spike) == (Action.ROLL_BACK, 2, True)
    assert detector.state()["losses"] == before
    detector.check(5.05, 1.0)
    assert detector.state()["losses"] == [*before[1:], 5.05]


@given(st.lists(st.floats(0.1, 20) | st.just(math.nan), max_size=30), st.floats(0.1, 40))
def test_restored_detector_decides_like_the_original(losses: list[float], next_loss: float) -> None:
    detector = SpikeDetector(limits())
    for loss in losses:
        detector.check(loss, 1.0)
    restored = SpikeDetector(limits(), json.loads(json.dumps(detector.state())))
    for loss in (next_loss, math.nan, next_loss / 2, 5.0):
        assert restored.check(loss, 1.0) == detector.check(loss, 1.0)
        assert restored.state() == detector.state()


# Skipped batches


@given(st.integers(0, 60), st.sets(st.integers(0, 80), max_size=40))
def test_step_reads_the_batch_after_that_many_kept_ones(step: int, skipped: set[int]) -> None:
    kept = [batch for batch in range(200) if batch not in skipped]
    assert batch_index_for_step(step, skipped) == kept[step]


def test_rollbacks_are_recorded_in_order_and_stale_ones_dropped(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    first = {"batches": [3, 4], "checkpoint": 0, "step": 5, "reason": "loss nan"}
    second = {"batches": [7], "checkpoint": 5, "step": 6, "reason": "loss inf"}
    write_json(run.rollbacks_path, [first, second])
    assert run.rollbacks() == [first, second]
    assert batches_of(run.rollbacks()) == {3, 4, 7}
    discard_stale_rollbacks(run)
    assert run.rollbacks() == [first]


# Runs


@pytest.fixture
def inject(small: Path, monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Function that injects faults of one kind at a row of each of some batches."""

    def inject_at(what: str, *indices: int) -> None:
        faults = [fault_in_batch(load_recipe(small), what, batch, 4) for batch in indices]
        inject_into_losses(faults, monkeypatch.setattr)

    return inject_at


@pytest.fixture
def train_without(small: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Function that trains from scratch without faults and with some batches skipped from the start."""

    def train_reference(*skipped: int, **fields: Any) -> Path:
        folder = work_dir / "reference"
        record = {"batches": list(skipped), "checkpoint": 0, "step": 0, "reason": "manual"}
        write_json(folder / "runs/small/skipped_batches.json", [record])
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            return folder / train(load_recipe(small, **fields))

    return train_reference


def rollbacks_of(run: Path) -> list[tuple[int, int, list[int]]]:
    """Return step, checkpoint and skipped batches of each rollback."""
    return [(row["step"], row["checkpoint"], row["skipped_batches"]) for row in read_events(run, "rollback")]


def all_finite(run: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load_weights(run).values())


@pytest.mark.parametrize(("what", "reason"), [("nan", "loss nan"), ("infinite", "gradient norm (inf|nan)")])
def test_step_that_is_not_finite_is_skipped(
    small: Path, work_dir: Path, inject: Inject, what: str, reason: str
) -> None:
    inject(what, 12)
    run = train(load_recipe(small))
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["step"] for row in rows if row["loss"] is None or "skipped" in row] == [13]
    assert rows[12]["loss"] is rows[12]["gradient_norm"] is None
    assert [(row["step"], row["reason"]) for row in read_events(run, "skip")] == [(13, rows[12]["skipped"])]
    assert re.search(reason, rows[12]["skipped"])
    assert {row["event"] for row in read_events(run)} == {"start", "checkpoint", "skip", "done"}
    assert rows[-1]["loss"] < rows[11]["loss"]
    assert all_finite(run)


def test_skipped_step_changes_no_weight(small: Path, work_dir: Path, inject: Inject) -> None:
    inject("nan", 1, 2)
    run = train(load_recipe(small, **{"train.tokens": 3 * 6 * 64, "checkpoint.every_steps": 1, "checkpoint.keep": 3}))
    first, *others = (RunDir(run).checkpoint(step).path for step in (1, 2, 3))
    assert all(same_weights(first, other) for other in others)


@pytest.mark.parametrize("what", ["nan", "infinite"])
def test_too_many_skips_roll_back_and_skip_their_batches(
    small: Path, work_dir: Path, inject: Inject, train_without: Train, what: str
) -> None:
    inject(what, 23, 24, 25, 26)
    run = work_dir / train(load_recipe(small, **{"guard.max_skips": 2}))
    # The fourth bad batch returns at the step of the first; alone it is skipped like any other.
    assert event_steps(run, "skip") == [24, 25, 24]
    assert rollbacks_of(run) == [(26, 20, [23, 24, 25])]
    rollback = read_events(run, "rollback")[0]
    record = {key: rollback[key] for key in ("step", "checkpoint", "reason")}
    assert RunDir(run).rollbacks() == [record | {"batches": [23, 24, 25]}]
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row.get("batch") for row in rows] == [None] * 20 + [20, 21, 22, *range(26, 43)]
    assert [row["step"] for row in rows if row["loss"] is None] == [24]
    assert all_finite(run)
    assert same_weights(run, train_without(23, 24, 25))


@pytest.mark.parametrize(
    ("spikes", "fields", "rollbacks"),
    [
        ([27], {}, [(28, 20, [26, 27])]),
        ([20], {}, [(21, 20, [20])]),  # no batch before the checkpoint
        ([12], {"checkpoint.every_steps": 100}, [(13, 0, [11, 12])]),
        ([15, 25, 36], {"guard.max_rollbacks": 1}, [(16, 10, [14, 15]), (24, 20, [24, 25]), (33, 30, [35, 36])]),
    ],
    ids=["spike", "after a checkpoint", "before the first checkpoint", "several checkpoints"],
)
def test_run_after_a_spike_equals_one_without_its_batches(
    small: Path,
    work_dir: Path,
    inject: Inject,
    train_without: Train,
    spikes: list[int],
    fields: dict[str, Any],
    rollbacks: list[tuple[int, int, list[int]]],
) -> None:
    inject("spike", *spikes)
    run = work_dir / train(load_recipe(small, **fields))
    assert rollbacks_of(run) == rollbacks
    starts = [checkpoint for _, checkpoint, _ in rollbacks]
    assert event_steps(run, "start", "resume") == [0, *starts]
    assert [record["checkpoint"] for record in RunDir(run).rollbacks()] == starts
    assert_same_run(run, train_without(*chain.from_iterable(skipped for *_, skipped in rollbacks), **fields))


@pytest.mark.parametrize("is_spike", [True, False])
def test_higher_spike_threshold_is_a_remedy_only_after_a_spike(small: Path, work_dir: Path, is_spike: bool) -> None:
    state = single_process.build_state(load_recipe(small, **{"guard.max_rollbacks": 0}))
    with pytest.raises(RunStoppedError, match=r"guard\.max_rollbacks") as error:
        roll_back(state, None, 20, Decision(Action.ROLL_BACK, "a reason", 2, is_spike))
    assert ("guard.spike_z_score" in str(error.value)) == is_spike


def test_too_many_rollbacks_end_the_run(
    small: Path, work_dir: Path, inject: Inject, capfd: pytest.CaptureFixture[str]
) -> None:
    inject("spike", *range(24, 60))
    flags = ["--guard.spike_window_steps", "8", "--guard.max_rollbacks", "2"]
    assert cli.main(["train", str(small / "recipe.yaml"), *flags]) == 1
    run = Path("runs/small")
    assert [row["checkpoint"] for row in read_events(run, "rollback")] == [20, 20]
    end = read_events(run)[-1]
    assert (end["event"], end["step"]) == ("failed", 22)  # the last step with a row
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tinyllama: ")]
    for text in (end["problem"], line):
        assert "step 23: loss" in text
        assert "step 20" in text
    assert [checkpoint.step for checkpoint in RunDir(run).checkpoints()] == [10, 20]
    with pytest.raises(RunStoppedError, match="step 20"):  # also when it is started again
        train(load_recipe(small, **{"guard.max_rollbacks": 2}))


def test_resume_after_a_kill_during_a_rollback_is_bit_identical(
    small: Path, work_dir: Path, train_without: Train
) -> None:
    recipe = load_recipe(small)
    spike, kill = fault_in_batch(recipe, "spike", 27, 4), fault_in_batch(recipe, "kill", 29, 1)
    with start_training(small, work_dir, "--guard.spike_window_steps", "8", faults=[spike, kill]) as training:
        assert training.end() == -9, training.output()
    run = training.run
    assert rollbacks_of(run)[0][2] == [26, 27]
    assert read_metrics(run)[-1]["step"] == 27
    train(recipe)
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 41))
    assert_same_run(run, train_without(26, 27))


def test_watchdog_ends_a_hanging_process() -> None:
    command = [sys.executable, str(Path(__file__).with_name("hanging_program.py")), "3", "0.5"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (1, "ready\nhang 0.5\n")


def test_blocked_process_reports_ctrl_c_and_ends_soon_after_a_stop_signal() -> None:
    command = [sys.executable, str(Path(__file__).with_name("hanging_program.py")), "3", "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "noted\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "hang 5\n"
        assert process.wait() == REQUEUE_STATUS
