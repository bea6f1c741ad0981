"""The planned memory is what torch's FSDP2 memory tracker finds, and what compiled blocks keep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllama.hardware import HARDWARE_SPECS
from tinyllama.plan.estimate import Assumptions, estimate
from tinyllama.plan.memory import activation_bytes_per_token
from tinyllama.recipe import Recipe

pytestmark = pytest.mark.slow

TRACKING = Path(__file__).with_name("tracking.py")


CASES: dict[str, dict[str, object]] = {
    "none": {},
    "selective": {"parallel.activation_checkpointing": "selective"},
    "full": {"parallel.activation_checkpointing": "full"},
    "fp32, tied": {"train.precision": "fp32", "train.micro_batch_sequences": 2, "model.tie_embeddings": True},
}


@pytest.fixture(scope="module")
def tracked() -> dict[str, int]:
    """What the tracker finds of each of `CASES` on 16 ranks."""
    command = [sys.executable, str(TRACKING), "tinyllama-1.1b", "16", json.dumps(list(CASES.values()))]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(zip(CASES, json.loads(said), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_1b_recipe_takes_what_the_fsdp2_tracker_finds_to_ten_per_cent(case: str, tracked: dict[str, int]) -> None:
    recipe = Recipe.load("tinyllama-1.1b", CASES[case] | {"train.compile": "false"})  # it sees no compiled code
    plan = estimate(recipe, 32_000, HARDWARE_SPECS["a100-40g"], Assumptions(gpus=16))
    assert plan.figures["memory_bytes_per_gpu"] == pytest.approx(tracked[case], rel=0.10)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("length", [256, 1024])
def test_a_compiled_block_keeps_what_is_planned(recompute: str, length: int) -> None:
    import torch

    from tinyllama.model.llama import Block, rope_table

    fields = {
        "parallel.activation_checkpointing": recompute,
        "train.sequence_length": length,
        "model.context_length": length,
    }
    recipe = Recipe.load("demo", fields)
    block = Block(recipe.model)
    block.recompute = recipe.parallel.activation_checkpointing
    compiled = torch.compile(block.forward, dynamic=False)
    x = torch.randn(2, length, recipe.model.dim, dtype=torch.bfloat16, requires_grad=True)
    rope = rope_table(length, recipe.model.head_dim, 1e4)
    there = {tensor.untyped_storage().data_ptr() for tensor in (rope, *block.parameters())}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compiled(x, rope, None)
    weights = sum(2 * matrix.numel() for matrix in block.parameters() if matrix.ndim > 1)  # their copies in bf16
    kept = sum(sizes.values()) - (weights if recompute == "none" else 0)
    plan = estimate(recipe, 4096, HARDWARE_SPECS["4090"], Assumptions())
    on_cpu = activation_bytes_per_token(type(plan.load)(**{**vars(plan.load), "is_cpu": True}))
    assert on_cpu * 2 * length == pytest.approx(kept, rel=0.05)


def test_the_largest_micro_batch_fits_and_the_next_larger_does_not() -> None:
    recipe = Recipe.load("tinyllama-1.1b")
    most = estimate(recipe, 32_000, HARDWARE_SPECS["a100-80g"], Assumptions(gpus=16)).figures[
        "largest_micro_batch_sequences"
    ]
    at = [
        estimate(
            Recipe.load("tinyllama-1.1b", {"train.micro_batch_sequences": rows}), 32_000, HARDWARE_SPECS["a100-80g"],
            Assumptions(gpus=16),
        ).figures["memory_fits"]
        for rows in (most, 2 * most)
    ]  # fmt: skip
    assert at == [True, False]
