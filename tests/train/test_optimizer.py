"""Both update rules do what the recipe says, from the same gradients, on any number of ranks."""

import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.single_process import build_state, load_recipe, train_step
from tests.train.torchrun import metric_by_step, train_recipes, write_recipe
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from tinyllama.data.batches import batch_of_step
from tinyllama.loading import load_model
from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Model
from tinyllama.runs import checkpoint
from tinyllama.runs.run_dir import RunDir
from tinyllama.train.loop import train
from tinyllama.train.optimizer import build_optimizers

MUON: dict[str, object] = {"train.optimizer.name": "muon"}
STEPS = 20
FEW: dict[str, object] = {"train.tokens": STEPS * 384, "train.validate_every_steps": STEPS}


def test_muon_gets_exactly_the_blocks_matrices_and_adamw_the_rest(small: Path) -> None:
    recipe = load_recipe(small, **MUON, **{"model.tie_embeddings": False})
    model = Llama(recipe.model, 601)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    given: dict[str, list[str]] = defaultdict(list)
    decay = {}
    for optimizer in build_optimizers(model, recipe.train.optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                given[type(optimizer).__name__].append(names[id(parameter)])
                decay[names[id(parameter)]] = group["weight_decay"]
    matrices = ("attention.qkv", "attention.out", "ffn.gate_up", "ffn.down")
    assert sorted(given["Muon"]) == sorted(f"blocks.{layer}.{name}.weight" for layer in range(2) for name in matrices)
    assert sorted(given["Muon"] + given["AdamW"]) == sorted(names.values())
    assert {name for name, value in decay.items() if value == 0} == {name for name in decay if "norm" in name}
    assert {value for name, value in decay.items() if "norm" not in name} == {0.1}


def test_adamw_alone_gets_everything_once(small: Path) -> None:
    model = Llama(load_recipe(small).model, 601)
    (optimizer,) = build_optimizers(model, load_recipe(small).train.optimizer)
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, given)) == sorted(map(id, model.parameters()))


@pytest.fixture(scope="module")
def muon_runs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `alone` and `two`: 20 steps of Muon by one rank and by two."""
    folder = tmp_path_factory.mktemp("muon")
    for ranks, name in ((1, "alone"), (2, "two")):
        train_recipes(folder, ranks, [write_recipe(folder, small, name, **MUON, **FEW)])
    return folder


@pytest.mark.slow
def test_muon_lowers_the_loss(muon_runs: Path) -> None:
    found = metric_by_step(muon_runs, "alone")
    assert len(found) == STEPS
    assert found[-1] < found[0] - 0.5


def test_muon_on_two_ranks_follows_one(muon_runs: Path) -> None:
    assert metric_by_step(muon_runs, "two") == pytest.approx(metric_by_step(muon_runs, "alone"), rel=1e-3)


def went_on(small: Path, folder: Path, name: str) -> Path:
    """The run of a copy that has lost its last checkpoint, gone on with by one rank."""
    again = folder / "runs" / f"{name}-again"
    shutil.copytree(folder / "runs" / name, again)
    checkpoint.delete(checkpoint.checkpoint_folder(again, STEPS))
    train_recipes(folder, 1, [write_recipe(folder, small, again.name, **MUON, **FEW)])
    assert [row["step"] for row in RunDir(again).events() if row["event"] == "resume"] == [10]
    return again


def test_muon_goes_on_from_a_checkpoint_to_the_same_weights_bit_for_bit(small: Path, muon_runs: Path) -> None:
    wanted = load_model(muon_runs / "runs/alone").state_dict()
    found = load_model(went_on(small, muon_runs, "alone")).state_dict()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def test_muon_goes_on_alone_from_what_two_ranks_saved(small: Path, muon_runs: Path) -> None:
    again = went_on(small, muon_runs, "two")
    assert metric_by_step(muon_runs, again.name) == pytest.approx(metric_by_step(muon_runs, "two"), rel=1e-3)


def test_z_loss_has_autograds_gradient_and_the_loss_leaves_it_out() -> None:
    shape = Model(dim=32, layers=1, heads=2, kv_heads=1, ffn_dim=64, context_length=128)
    model, plain = Llama(shape, 97), Llama(shape, 97)
    for each in (model, plain):
        initialize(each, 3)
        with torch.no_grad():
            each.head_weight.mul_(20)  # logits of some size, whose log-sum is not all but the same everywhere
    rows = torch.randint(97, (12, 101), generator=torch.Generator().manual_seed(2))  # more than one chunk of tokens
    logits = plain(rows[:, :-1]).flatten(0, 1)
    nats = F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum")
    (nats + 0.01 * logits.logsumexp(-1).square().sum()).backward()
    loss = model.loss(rows[:, :-1], rows[:, 1:], 0.01)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(nats.detach()), rel=1e-5)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert (parameter.grad - other.grad).norm() < 1e-4 * other.grad.norm(), name


def test_a_steps_loss_leaves_z_loss_out_and_its_update_does_not(small: Path) -> None:
    found = []
    for z_loss in (0.0, 0.1):
        trainer = build_state(load_recipe(small, **{"train.z_loss": z_loss}))
        rows = [batch_of_step(trainer.recipe, trainer.store, step) for step in range(2)]
        found.append([train_step(trainer, step, rows[step])[0] for step in range(2)])
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_every_group_steps_at_the_schedules_rate_and_the_metrics_say_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rising, peak, final = [3e-3 * step / 5 for step in range(1, 6)], 3e-3, 3e-4
    wanted = {
        "wsd": [*rising, *[peak] * 11, *[peak - (peak - final) * part / 4 for part in (1, 2, 3, 4)]],
        "cosine": [*rising, *[final + (peak - final) * (1 + math.cos(math.pi * part / 14)) / 2 for part in range(15)]],
    }
    for schedule, rates in wanted.items():
        stepped: dict[str, list[list[float]]] = defaultdict(list)

        def note(optimizer: torch.optim.Optimizer, *_: Any, kept: Any = stepped) -> None:
            kept[type(optimizer).__name__].append([group["lr"] for group in optimizer.param_groups])

        handle = register_optimizer_step_post_hook(note)
        try:
            run = train(load_recipe(small, name=schedule, **MUON, **FEW, **{"train.schedule.name": schedule}))
        finally:
            handle.remove()
        assert [row["learning_rate"] for row in RunDir(run).metrics()] == pytest.approx(rates)
        assert stepped["Muon"] == [[pytest.approx(rate)] for rate in rates]
        assert stepped["AdamW"] == [[pytest.approx(rate)] * 2 for rate in rates]
