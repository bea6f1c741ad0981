"""AdamW, Muon, z-loss and the learning rates that both optimizers step at, on one rank and on two."""

import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.reading import batch_of_step
from tests.train.launch import event_steps, load_weights
from tests.train.single_process import build_state, load_recipe, train_step
from tests.train.torchrun import metric_by_step, train_recipes, write_recipe
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Model
from tinyllama.runs.run_dir import RunDir
from tinyllama.train.loop import train
from tinyllama.train.muon import Muon
from tinyllama.train.setup import build_optimizers, clip_grad_norm, optimizer_step

MUON: dict[str, object] = {"train.optimizer.name": "muon", "train.optimizer.embedding_learning_rate": 6e-3}
STEPS = 20
SHORT: dict[str, object] = {"train.tokens": STEPS * 384, "train.validate_every_steps": STEPS}


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(small: Path) -> None:
    recipe = load_recipe(small, **MUON, **{"model.tie_embeddings": False})
    model = Llama(recipe.model, 601)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assigned: dict[str, list[str]] = defaultdict(list)
    decay = {}
    for optimizer in build_optimizers(model, recipe.train.optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assigned[type(optimizer).__name__].append(names[id(parameter)])
                decay[names[id(parameter)]] = group["weight_decay"]
    matrices = ("attention.qkv", "attention.out", "ffn.gate_up", "ffn.down")
    expected = [f"blocks.{layer}.{name}.weight" for layer in range(2) for name in matrices]
    assert sorted(assigned["Muon"]) == sorted(expected)
    assert sorted(assigned["Muon"] + assigned["AdamW"]) == sorted(names.values())
    assert {name for name, value in decay.items() if value == 0} == {name for name in decay if "norm" in name}
    assert {value for name, value in decay.items() if "norm" not in name} == {0.1}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_only_embedding_and_head_step_at_the_embedding_rate(small: Path, name: str, is_tied: bool) -> None:
    fields = {"train.optimizer.name": name, "train.optimizer.embedding_learning_rate": 1.2e-2}
    recipe = load_recipe(small, **fields, **{"model.tie_embeddings": is_tied})
    model = Llama(recipe.model, 601)
    optimizers = build_optimizers(model, recipe.train.optimizer)
    optimizer_step(optimizers, recipe.train.optimizer.learning_rate / 2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    embeddings = {"embedding.weight"} | ({"head.weight"} if not is_tied else set())
    assert rates == {name: pytest.approx(6e-3 if name in embeddings else 1.5e-3) for name in names.values()}


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_muon_gets_the_parts_of_stacked_matrices_and_its_settings(
    small: Path, precision: torch.dtype, dtype: torch.dtype
) -> None:
    fields = {"train.optimizer.newton_schulz_steps": 3, "train.optimizer.normalize_rows": True}
    recipe = load_recipe(small, **MUON, **fields)
    model = Llama(recipe.model, 601, precision)
    (muon, _) = build_optimizers(model, recipe.train.optimizer)
    assert isinstance(muon, Muon)
    block = model.blocks[0]
    shape = recipe.model
    heads = [count * shape.head_dim for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
    assert muon.parts[block.get_parameter("attention.qkv.weight")] == heads
    assert muon.parts[block.get_parameter("ffn.gate_up.weight")] == [shape.ffn_dim, shape.ffn_dim]
    assert len(muon.parts) == 2 * shape.layers
    assert [group["ns_steps"] for group in muon.param_groups] == [3]
    assert muon.normalizes_rows
    assert muon.dtype == dtype


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_clipping_is_torchs_for_norms_below_and_above_the_threshold(scale: float) -> None:
    model, reference = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False)) for _ in "ab")
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        one.grad = scale * torch.randn(one.shape)
        other.grad = one.grad.clone()
    norm = clip_grad_norm(model, 1.0)
    assert norm == torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    assert (norm > 1) == (scale > 1)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.fixture(scope="module")
def muon_runs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs `one` and `two`: 20 steps of Muon on one rank and on two."""
    folder = tmp_path_factory.mktemp("muon")
    for ranks, name in ((1, "one"), (2, "two")):
        train_recipes(folder, ranks, [write_recipe(folder, small, name, **MUON, **SHORT)])
    return folder


@pytest.mark.long
@pytest.mark.slow
def test_muon_lowers_the_loss_alike_on_one_rank_and_two(muon_runs: Path) -> None:
    losses = metric_by_step(muon_runs, "one")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5
    assert metric_by_step(muon_runs, "two") == pytest.approx(losses, rel=1e-3)


def copy_without_last_checkpoint(small: Path, folder: Path, name: str, ranks: int) -> str:
    """Copy a run without its last checkpoint; return the name of the copy's recipe, to resume on so many ranks."""
    copy = RunDir(folder / "runs" / f"{name}-by-{ranks}")
    shutil.copytree(folder / "runs" / name, copy.path)
    copy.checkpoint(STEPS).delete()
    return write_recipe(folder, small, copy.path.name, **MUON, **SHORT)


@pytest.fixture(scope="module")
def resumed_runs(small: Path, muon_runs: Path) -> Path:
    """Folder of the runs `muon_runs` and of their copies, each resumed on one rank and on two from step 10."""
    for ranks in (1, 2):
        copies = [copy_without_last_checkpoint(small, muon_runs, name, ranks) for name in ("one", "two")]
        train_recipes(muon_runs, ranks, copies)
        for copy in copies:
            assert event_steps(muon_runs / "runs" / Path(copy).stem, "resume") == [10]
    return muon_runs


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("name", "resumed"), [("one", "one-by-1"), ("two", "two-by-2")])
def test_resume_with_muon_is_bit_identical(resumed_runs: Path, name: str, resumed: str) -> None:
    found, expected = load_weights(resumed_runs / "runs" / resumed), load_weights(resumed_runs / "runs" / name)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("name", "resumed"), [("one", "one-by-2"), ("two", "two-by-1")])
def test_muon_checkpoint_resumes_on_another_number_of_ranks(resumed_runs: Path, name: str, resumed: str) -> None:
    assert metric_by_step(resumed_runs, resumed) == pytest.approx(metric_by_step(resumed_runs, name), rel=1e-3)


def test_z_loss_changes_the_gradient_but_not_the_loss() -> None:
    shape = Model(dim=32, layers=1, heads=2, kv_heads=1, ffn_dim=64, context_length=128)
    model, reference = Llama(shape, 97), Llama(shape, 97)
    for each in (model, reference):
        initialize(each, 3)
        with torch.no_grad():
            each.head_weight.mul_(20)  # larger logits, whose log-sums differ between positions
    rows = torch.randint(97, (12, 101), generator=torch.Generator().manual_seed(2))  # more than one chunk of tokens
    logits = reference(rows[:, :-1]).flatten(0, 1)
    nats = F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum")
    (nats + 0.01 * logits.logsumexp(-1).square().sum()).backward()
    loss = model.loss(rows[:, :-1], rows[:, 1:], 0.01)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(nats.detach()), rel=1e-5)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert (parameter.grad - other.grad).norm() < 1e-4 * other.grad.norm(), name


def test_training_with_z_loss_logs_the_loss_without_it(small: Path) -> None:
    losses = []
    for z_loss in (0.0, 0.1):
        state = build_state(load_recipe(small, **{"train.z_loss": z_loss}))
        batches = [batch_of_step(state.recipe, state.store, step) for step in range(2)]
        losses.append([train_step(state, step, batches[step])[0] for step in range(2)])
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


RISING, PEAK, FINAL = [3e-3 * step / 5 for step in range(1, 6)], 3e-3, 3e-4
RATES = {
    "wsd": [*RISING, *[PEAK] * 11, *[PEAK - (PEAK - FINAL) * part / 4 for part in (1, 2, 3, 4)]],
    "cosine": [*RISING, *[FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi * part / 14)) / 2 for part in range(15)]],
}


@pytest.mark.parametrize("schedule", RATES)
def test_all_parameter_groups_step_at_the_logged_rate(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    monkeypatch.chdir(tmp_path)
    applied: dict[str, list[list[float]]] = defaultdict(list)

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        applied[type(optimizer).__name__].append([group["lr"] for group in optimizer.param_groups])

    handle = register_optimizer_step_post_hook(record)
    try:
        run = train(load_recipe(small, **MUON, **SHORT, **{"train.schedule.name": schedule}))
    finally:
        handle.remove()
    assert [row["learning_rate"] for row in RunDir(run).metrics()] == pytest.approx(RATES[schedule])
    assert applied["Muon"] == [[pytest.approx(rate)] for rate in RATES[schedule]]
    assert applied["AdamW"] == [[pytest.approx(rate), pytest.approx(2 * rate)] for rate in RATES[schedule]]
