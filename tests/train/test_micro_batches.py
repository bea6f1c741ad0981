"""What a step does once instead of once per micro-batch: casts, all-gathers and reductions."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.single_process import build_state, load_recipe, train_step
from tests.train.torchrun import run_torchrun
from torch import Tensor
from torch._dynamo.utils import counters

from tinyllama.distributed import World
from tinyllama.hardware import HARDWARE_SPECS
from tinyllama.model.flops import STEP_MEMORY_FRACTION, num_parameters
from tinyllama.model.llama import Llama
from tinyllama.plan.estimate import Assumptions, estimate
from tinyllama.train import setup
from tinyllama.train.loop import forward_backward
from tinyllama.train.setup import TrainState

PROGRAM = Path(__file__).with_name("micro_batches_program.py")
AMPLE, NONE = 10**12, 0
"""Memory of a device: all weights can be kept, or none."""
LAYERS = 2
GROUPS = LAYERS + 1
"""Groups of weights that FSDP gathers together: each block, and the remaining weights."""
BATCH: dict[str, Any] = {"train.batch_sequences": 16, "train.micro_batch_sequences": 1}
BF16 = {"train.precision": "bf16"}
HYBRID = {"parallel.replicate": 2}
MASK = {"train.document_mask": True}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {  # ranks, memory, fields
    "kept": (2, AMPLE, {}),
    "kept, two micro-batches": (2, AMPLE, {"train.micro_batch_sequences": 4}),
    "one micro-batch": (2, AMPLE, {"train.micro_batch_sequences": 8}),
    "no memory": (2, NONE, {}),
    "kept, tied": (2, AMPLE, {"model.tie_embeddings": True}),
    "kept, bf16": (2, AMPLE, BF16),
    "kept, bf16, compiled": (2, AMPLE, BF16 | {"train.compile": True}),
    "kept, full checkpointing": (2, AMPLE, {"parallel.activation_checkpointing": "full"}),
    "kept, selective checkpointing": (2, AMPLE, {"parallel.activation_checkpointing": "selective"}),
    "masked": (2, NONE, MASK),
    "kept, masked, bf16, compiled, selective checkpointing": (
        2,
        AMPLE,
        MASK | BF16 | {"train.compile": True, "parallel.activation_checkpointing": "selective"},
    ),
    "2 replicas of 1": (2, NONE, HYBRID),
    "4 ranks, kept": (4, AMPLE, {}),
    "2 x 2, kept": (4, AMPLE, HYBRID),
    "2 x 2": (4, NONE, HYBRID),
    "2 x 2, two micro-batches": (4, NONE, HYBRID | {"train.micro_batch_sequences": 2}),
    "2 x 2, tied": (4, NONE, HYBRID | {"model.tie_embeddings": True}),
}


@pytest.fixture(scope="module")
def results(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The program's result for each of CASES."""
    found: dict[str, dict[str, Any]] = {}
    for ranks in (2, 4):
        names = [name for name, case in CASES.items() if case[0] == ranks]
        cases = json.dumps([{"memory": CASES[name][1], "fields": BATCH | CASES[name][2]} for name in names])
        folder = tmp_path_factory.mktemp("ranks")
        done = run_torchrun(folder, ranks, str(PROGRAM), str(small / "recipe.yaml"), cases)
        assert done.returncode == 0, done.stderr
        found |= zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True)  # gloo of torch 2.9 prints lines
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_the_gradients_of_one_process(results: dict[str, dict[str, Any]], name: str) -> None:
    tolerance = 3e-3 if "bf16" in name else 1e-5
    assert results[name]["difference"] < tolerance
    assert results[name]["loss"] < tolerance / 10
    assert results[name]["is_sharded"]  # after the step, in float32


@pytest.mark.long
def test_gradients_of_micro_batches_add_up_in_float32(results: dict[str, dict[str, Any]]) -> None:
    assert results["kept, bf16"]["rounding"] < 1e-6


@pytest.mark.long
def test_kept_weights_are_gathered_and_reduced_once_per_step(results: dict[str, dict[str, Any]]) -> None:
    for name in ("kept", "kept, two micro-batches", "4 ranks, kept", "2 x 2, kept", "kept, full checkpointing"):
        counts = results[name]["collectives"]
        assert (counts["_allgather_base_"], counts["_reduce_scatter_base_"]) == (GROUPS, GROUPS), name
    assert results["no memory"]["collectives"]["_reduce_scatter_base_"] == 8 * GROUPS
    assert results["one micro-batch"]["collectives"]["_reduce_scatter_base_"] == GROUPS


@pytest.mark.long
def test_replicas_all_reduce_once_per_step(results: dict[str, dict[str, Any]]) -> None:
    four, two = (results[name]["collectives"] for name in ("2 x 2", "2 x 2, two micro-batches"))
    assert four["_reduce_scatter_base_"] == 2 * two["_reduce_scatter_base_"] == 4 * GROUPS
    assert four["allreduce_"] == two["allreduce_"]


@pytest.mark.long
def test_blocks_share_one_compiled_graph_with_kept_weights(results: dict[str, dict[str, Any]]) -> None:
    for name in ("kept, bf16, compiled", "kept, masked, bf16, compiled, selective checkpointing"):
        assert results[name]["graphs"] == 2  # one of the ranks' model and one of the single process's


def gradients_of_step(state: TrainState, sequences: Tensor) -> tuple[Tensor, ...]:
    """Return the loss and the gradients of a step with these sequences."""
    nats, _ = forward_backward(state, sequences)
    gradients = [parameter.grad for parameter in state.model.parameters()]
    state.model.zero_grad()
    return (nats, *(gradient for gradient in gradients if gradient is not None))


def batch_of(state: TrainState, seed: int = 0) -> Tensor:
    """Return random sequences."""
    train, generator = state.recipe.train, torch.Generator().manual_seed(seed)
    size = (train.batch_sequences, train.sequence_length + 1)
    return torch.randint(state.model.vocab_size, size, generator=generator)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model.tie_embeddings": True},
        {"parallel.activation_checkpointing": "full"},
        {"parallel.activation_checkpointing": "selective"},
        pytest.param({"train.compile": True}, marks=pytest.mark.slow),
        pytest.param({"train.compile": True, "parallel.activation_checkpointing": "selective"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_cast_per_step_changes_no_bit(small: Path, fields: dict[str, Any]) -> None:
    torch._dynamo.reset()  # earlier tests of this process may have used up the limit of recompilations
    state = build_state(load_recipe(small, **BF16 | fields))
    batch = batch_of(state)
    counters.clear()
    state.keeps_weights = False
    expected = gradients_of_step(state, batch)
    state.keeps_weights = True
    found = gradients_of_step(state, batch)
    assert len(found) == 1 + len(list(state.model.parameters()))
    assert all(map(torch.equal, found, expected))
    if "train.compile" in fields:
        assert counters["stats"]["unique_graphs"] == 2  # all blocks share a graph, with and without the copies


def test_no_copy_is_left_after_a_step_or_an_error(small: Path) -> None:
    state = build_state(load_recipe(small, **BF16))
    state.keeps_weights = True
    names, before = list(state.model.state_dict()), [*state.model.parameters()]
    for seed in range(2):
        train_step(state, seed, batch_of(state, seed))
        # Weights of another object, which has no copies, give the same logits: none is stale.
        other = Llama(state.recipe.model, state.model.vocab_size, torch.bfloat16)
        other.load_state_dict(state.model.state_dict())
        ids = batch_of(state)[:1]
        assert torch.equal(state.model(ids), other(ids))
        assert state.model.loss(ids, ids) == other.loss(ids, ids)
    with pytest.raises(IndexError):
        forward_backward(state, batch_of(state) + state.model.vocab_size)
    assert list(state.model.state_dict()) == names
    assert all(
        now is then and now.dtype == torch.float32 for now, then in zip(state.model.parameters(), before, strict=True)
    )


@pytest.mark.parametrize(("gpus", "fields", "bytes_per_parameter"), [(1, BF16, 2), (2, BF16, 6), (2, {}, 8)])
def test_training_and_plan_keep_weights_in_the_same_cases(
    small: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, fields: dict[str, Any], bytes_per_parameter: int
) -> None:
    recipe = load_recipe(small, **fields)
    needed = bytes_per_parameter * num_parameters(recipe.model, 600) / STEP_MEMORY_FRACTION
    for memory, is_kept in ((math.ceil(needed), True), (math.floor(needed) - 10, False)):
        spec = replace(HARDWARE_SPECS["h100"], memory_bytes=memory)
        assert estimate(recipe, 600, spec, Assumptions(gpus=gpus)).figures["keeps_weights"] == is_kept
        monkeypatch.setattr(setup, "smallest_device_memory", lambda _, memory=memory: memory)
        assert setup.run_keeps_weights(recipe, 600, World(0, gpus, torch.device("cpu"))) == is_kept
    one = load_recipe(small, **fields, **{"train.micro_batch_sequences": 6})
    assert not estimate(one, 600, HARDWARE_SPECS["h100"], Assumptions(gpus=gpus)).figures["keeps_weights"]
