"""fp16 with loss scaling: the rules of torch's GradScaler, skipped steps, resume, and what fp16 is refused for."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.fault_injection import inject_into_losses
from tests.train.launch import (
    assert_same_run,
    event_steps,
    fault_in_batch,
    read_events,
    read_metrics,
    same_weights,
)
from tests.train.single_process import SINGLE_PROCESS, build_state, load_recipe
from tests.train.torchrun import metric_by_step, train_recipes, write_recipe
from torch import Tensor

from tinyllama.data.batches import batches
from tinyllama.distributed import World
from tinyllama.errors import InputError
from tinyllama.plots.curves import summarize_metrics
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir
from tinyllama.train import loss_scale
from tinyllama.train.guard import Action
from tinyllama.train.loop import TrainingLoop, forward_backward, train
from tinyllama.train.loss_scale import LossScale
from tinyllama.train.setup import TrainState, check_precision, optimizer_step

pytest_plugins = ["tests.train.fixtures"]

FP16 = {"train.precision": "fp16"}
OVERFLOWING_SCALE = 2.0**27
"""A scale at which the gradients of the small model overflow."""

Scales = Callable[..., None]


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> Scales:
    """Function that sets the initial scale and the growth interval."""

    def set_scales(initial: float, growth_interval: int = 3) -> None:
        monkeypatch.setattr(loss_scale, "INITIAL_SCALE", initial)
        monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", growth_interval)

    return set_scales


def weights_of(state: TrainState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.model.state_dict().items()}


# Rules


def test_scales_skips_and_weights_equal_those_of_grad_scaler(small: Path, work_dir: Path, scales: Scales) -> None:
    scales(OVERFLOWING_SCALE)
    recipe = load_recipe(small, **FP16)
    ours, theirs = build_state(recipe), build_state(recipe)
    scale = LossScale("fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=OVERFLOWING_SCALE, growth_interval=3)
    skipped = []
    for step, (sequences, _) in zip(range(14), batches(recipe, ours.store, 0, 0, 1), strict=False):
        assert scale.value == scaler.get_scale(), step
        nats, norm = forward_backward(ours, sequences, loss_scale=scale.value)
        decision = scale.check(float(nats), float(norm))
        if decision is None:
            optimizer_step(ours.optimizers, 1e-3)
        skipped.append(decision is not None)
        for micro_batch in sequences.split(2):
            loss = theirs.model.loss(micro_batch[:, :-1], micro_batch[:, 1:])
            scaler.scale(loss / recipe.train.batch_tokens).backward()
        (optimizer,) = theirs.optimizers
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        ours.model.zero_grad()
        theirs.model.zero_grad()
        weights = weights_of(theirs)
        assert all(torch.equal(value, weights[name]) for name, value in weights_of(ours).items()), step
    assert skipped[0] and skipped[-4:].count(True) == 1  # from then on, the scale grows and overflows in turn


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_scale_changes_no_bit_of_the_gradient_without_underflow(small: Path, work_dir: Path, precision: str) -> None:
    state = build_state(load_recipe(small, **{"train.precision": precision}))
    sequences, _ = next(iter(batches(state.recipe, state.store, 0, 0, 1)))
    found = []
    for scale in (1.0, 1024.0):
        nats, norm = forward_backward(state, sequences, loss_scale=scale)
        found.append([nats, norm, *(p.grad.clone() for p in state.model.parameters() if p.grad is not None)])
        state.model.zero_grad()
    assert all(torch.equal(plain, scaled) for plain, scaled in zip(*found, strict=True))


def test_scale_of_other_precisions_is_always_1() -> None:
    scale = LossScale("bf16", LossScale("fp16").state())  # resumed with another precision
    assert [scale.check(1.0, math.inf), scale.check(1.0, 1.0), scale.value, scale.state()] == [None, None, 1.0, None]


def test_guard_decides_at_scale_1_and_on_a_loss_that_is_not_finite() -> None:
    scale = LossScale("fp16", {"scale": 2.0, "finite_steps": 7})
    assert scale.check(math.nan, math.nan) is None
    assert scale.state() == {"scale": 2.0, "finite_steps": 7}
    decision = scale.check(5.0, math.inf)
    assert decision is not None
    assert decision.action is Action.OVERFLOW
    assert scale.check(5.0, math.inf) is None
    assert scale.state() == {"scale": 1.0, "finite_steps": 0}


def test_restored_scale_continues_like_the_original() -> None:
    scale = LossScale("fp16")
    for step in range(2 * loss_scale.GROWTH_INTERVAL + 10):
        scale.check(1.0, math.nan if step == 500 else 1.0)
    restored = LossScale("fp16", json.loads(json.dumps(scale.state())))
    assert restored.state() == scale.state() == {"scale": 65536.0, "finite_steps": 1509}
    for _ in range(500):
        assert restored.check(1.0, 1.0) == scale.check(1.0, 1.0)
        assert restored.state() == scale.state()


# Runs


def train_until(recipe: Recipe, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until Ctrl-C after the row of `step`."""
    log_step = TrainingLoop._log_step

    def interrupted(self: TrainingLoop, *arguments: Any) -> None:
        log_step(self, *arguments)
        if self.step + 1 == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_log_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)


def test_resumed_run_equals_an_uninterrupted_one(
    small: Path, work_dir: Path, scales: Scales, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales(OVERFLOWING_SCALE)
    run = work_dir / train(load_recipe(small, **FP16))
    (elsewhere := work_dir / "interrupted").mkdir()
    monkeypatch.chdir(elsewhere)
    train_until(load_recipe(small, **FP16), 27, monkeypatch)
    state = RunDir(elsewhere / "runs/small").checkpoint(20).state()["loss_scale"]
    assert state["finite_steps"] > 0 and state["scale"] != OVERFLOWING_SCALE
    resumed = elsewhere / train(load_recipe(small, **FP16))
    assert_same_run(run, resumed)
    rows, resumed_rows = read_metrics(run), read_metrics(resumed)
    assert [row["loss_scale"] for row in resumed_rows] == [row["loss_scale"] for row in rows]
    assert [row.get("skipped") for row in resumed_rows] == [row.get("skipped") for row in rows]
    overflows = [row["step"] for row in rows if "skipped" in row]
    assert overflows[0] == 1 and any(step > 20 for step in overflows)


def test_overflow_is_visible_but_no_skip_of_the_guard(
    small: Path, work_dir: Path, scales: Scales, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales(65536.0, 1000)
    faults = [fault_in_batch(load_recipe(small), "infinite", batch, 4) for batch in (12, 13, 14)]
    inject_into_losses(faults, monkeypatch.setattr)
    run = train(load_recipe(small, **FP16, **{"guard.max_skips": 0, "train.tokens": 20 * 6 * 64}))
    rows = read_metrics(run)
    assert [row["step"] for row in rows if "skipped" in row] == [13, 14, 15]
    assert [row["loss_scale"] for row in rows[11:16]] == [65536, 65536, 32768, 16384, 8192]
    assert rows[12]["gradient_norm"] is None and rows[12]["loss"] > 0
    assert rows[12]["skipped"] == "gradient overflow at a loss scale of 65,536"
    assert {row["event"] for row in read_events(run)} == {"start", "checkpoint", "done"}
    summary = summarize_metrics(rows)
    assert (summary.num_skipped, len(summary.curves["loss"])) == (3, 20)
    assert rows[-1]["loss"] < rows[11]["loss"]
    assert rows[-1]["mfu"] is None


def test_skipped_step_changes_no_weight(
    small: Path, work_dir: Path, scales: Scales, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales(65536.0)
    inject_into_losses([fault_in_batch(load_recipe(small), "infinite", 1, 4)], monkeypatch.setattr)
    run = train(load_recipe(small, **FP16, **{"train.tokens": 2 * 6 * 64, "checkpoint.every_steps": 1}))
    assert same_weights(*(RunDir(run).checkpoint(step).path for step in (1, 2)))


def test_rollback_restores_the_scale_and_follows_once_the_scale_is_1(
    small: Path, work_dir: Path, scales: Scales, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales(4.0, 1000)
    faults = [fault_in_batch(load_recipe(small), "infinite", batch, 4) for batch in range(12, 17)]
    inject_into_losses(faults, monkeypatch.setattr)
    run = train(load_recipe(small, **FP16, **{"guard.max_skips": 2}))
    assert event_steps(run, "skip") == [15, 16]  # 13 and 14 halved the scale to 1
    rollback = read_events(run, "rollback")[0]
    assert (rollback["step"], rollback["checkpoint"], rollback["skipped_batches"]) == (17, 10, [14, 15, 16])
    scales_used = [row["loss_scale"] for row in read_metrics(run)]
    assert scales_used == [4.0] * 13 + [2.0] + [1.0] * 26


def test_loss_that_is_not_finite_is_skipped_by_the_guard(
    small: Path, work_dir: Path, scales: Scales, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales(65536.0)
    inject_into_losses([fault_in_batch(load_recipe(small), "nan", 12, 4)], monkeypatch.setattr)
    run = train(load_recipe(small, **FP16, **{"train.tokens": 15 * 6 * 64}))
    assert event_steps(run, "skip") == [13]
    rows = read_metrics(run)
    assert rows[12]["loss"] is None
    assert rows[12]["loss_scale"] == rows[13]["loss_scale"]


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_train_in_fp16_like_one(small: Path, tmp_path: Path) -> None:
    fields = FP16 | {"train.tokens": 20 * 8 * 64, "train.batch_sequences": 8, "train.micro_batch_sequences": 8}
    names = {1: "one", 2: "two"}
    for ranks, name in names.items():
        train_recipes(tmp_path, ranks, [write_recipe(tmp_path, small, name, **fields)])
    one, two = (metric_by_step(tmp_path, name) for name in names.values())
    assert two == pytest.approx(one, rel=1e-3)
    assert one[-1] < one[0] - 1


# Refusals


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> World:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return World(0, 1, torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "capability", "fields", "message"),
    [
        ("Tesla T4", (7, 5), {"precision": "bf16"}, r"^train\.precision: Tesla T4 .*--train\.precision fp16"),
        ("Tesla P100", (6, 0), {"precision": "bf16"}, r"^train\.precision: Tesla P100 .*--train\.precision fp32"),
        ("Tesla T4", (7, 5), {"precision": "fp16", "optimizer.name": "muon"}, r"^train\.optimizer\.name: .*adamw"),
        ("Tesla T4", (7, 5), {"precision": "fp32", "optimizer.name": "muon"}, None),
        ("Tesla T4", (7, 5), {"precision": "fp16"}, None),
        ("Tesla T4", (7, 5), {"precision": "fp32"}, None),
        ("NVIDIA A100", (8, 0), {"precision": "bf16", "optimizer.name": "muon"}, None),
    ],
)
def test_bf16_is_refused_on_a_gpu_that_would_emulate_it(
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    fields: dict[str, Any],
    message: str | None,
) -> None:
    world = pretend_gpu(monkeypatch, name, capability)
    recipe = load_recipe(small, **{f"train.{field}": value for field, value in fields.items()})
    if message is None:
        check_precision(recipe.train, world)
    else:
        with pytest.raises(InputError, match=message):
            check_precision(recipe.train, world)


def test_fp16_on_a_cpu_prints_a_warning(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_precision(load_recipe(small, **FP16).train, SINGLE_PROCESS)
    assert "train.precision: on most CPUs, fp16" in capfd.readouterr().err
    check_precision(load_recipe(small).train, SINGLE_PROCESS)
    assert capfd.readouterr().err == ""


def test_fp16_with_float8_is_refused(small: Path) -> None:
    with pytest.raises(InputError, match=r"train.*float8 with precision fp16"):
        load_recipe(small, **FP16, **{"train.float8": True})
