"""The planned memory is what torch's FSDP2 memory tracker finds, and what compiled blocks save."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinyllama.hardware import HARDWARE_SPECS
from tinyllama.model.llama import Block
from tinyllama.model.rope import rope_table
from tinyllama.plan.estimate import Assumptions, estimate
from tinyllama.plan.formulas import activation_bytes_per_token, muon_bytes
from tinyllama.recipe import Recipe

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, object]] = {
    "none": {},
    "selective": {"parallel.activation_checkpointing": "selective"},
    "full": {"parallel.activation_checkpointing": "full"},
    "fp16": {"train.precision": "fp16"},
    "fp32, tied": {"train.precision": "fp32", "train.micro_batch_sequences": 2, "model.tie_embeddings": True},
    "kept weights": {},
    "kept weights, full": {"parallel.activation_checkpointing": "full"},
}
MUON: dict[str, object] = {"train.optimizer.name": "muon"}


def is_kept(case: str) -> bool:
    """Return whether a case's steps keep their weights; otherwise the GPU has too little memory for this."""
    return case.startswith("kept")


@pytest.fixture(scope="module")
def tracked() -> dict[str, int]:
    """Return the bytes that the tracker finds for each of `CASES` and for `MUON` on 16 ranks."""
    program = Path(__file__).with_name("fsdp_memory.py")
    cases = CASES | {"muon": MUON}
    arguments = json.dumps([[fields, is_kept(case)] for case, fields in cases.items()])
    command = [sys.executable, str(program), "tinyllama-1.1b", "16", arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(zip(cases, json.loads(output), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_memory_of_1b_recipe_matches_fsdp2_tracker(case: str, tracked: dict[str, int]) -> None:
    recipe = Recipe.load("tinyllama-1.1b", CASES[case] | {"train.compile": "false"})  # the tracker needs eager code
    plan = estimate(recipe, 32_000, HARDWARE_SPECS["a100-80g" if is_kept(case) else "a100-40g"], Assumptions(gpus=16))
    assert plan.figures["keeps_weights"] == is_kept(case)
    assert plan.figures["memory_bytes_per_gpu"] == pytest.approx(tracked[case], rel=0.10)


@pytest.mark.long
def test_memory_of_muons_update_matches_tracker(tracked: dict[str, int]) -> None:
    plan = estimate(Recipe.load("tinyllama-1.1b", MUON), 32_000, HARDWARE_SPECS["a100-40g"], Assumptions(gpus=16))
    assert muon_bytes(plan.workload) == pytest.approx(tracked["muon"], rel=0.10)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(("length", "head_dim"), [(256, None), (1024, None), (256, 128)])
def test_compiled_block_saves_what_is_planned(checkpointing: str, length: int, head_dim: int | None) -> None:
    torch._dynamo.reset()  # earlier tests of this process may have used up the limit of recompilations
    fields = {
        "parallel.activation_checkpointing": checkpointing,
        "train.sequence_length": length,
        "model.context_length": length,
        "model.head_dim": head_dim,
    }
    recipe = Recipe.load("demo", fields)
    block = Block(recipe.model)
    block.activation_checkpointing = recipe.parallel.activation_checkpointing
    compiled = torch.compile(block.forward, dynamic=False)
    x = torch.randn(2, length, recipe.model.dim, dtype=torch.bfloat16, requires_grad=True)
    rope = rope_table(recipe.model, length)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (rope, *block.parameters())}
    sizes: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        compiled(x, rope, None)
    bf16_weights = sum(2 * matrix.numel() for matrix in block.parameters() if matrix.ndim > 1)
    saved = sum(sizes.values()) - (bf16_weights if checkpointing == "none" else 0)
    workload = replace(estimate(recipe, 4096, HARDWARE_SPECS["4090"], Assumptions()).workload, is_cpu=True)
    assert activation_bytes_per_token(workload) * 2 * length == pytest.approx(saved, rel=0.05)


def test_largest_micro_batch_fits_and_twice_as_large_does_not() -> None:
    def figures(micro_batch: int) -> dict[str, object]:
        recipe = Recipe.load("tinyllama-1.1b", {"train.micro_batch_sequences": micro_batch})
        return {**estimate(recipe, 32_000, HARDWARE_SPECS["a100-80g"], Assumptions(gpus=16)).figures}

    largest = figures(8)["largest_micro_batch_sequences"]
    assert isinstance(largest, int)
    assert figures(largest)["memory_fits"]
    assert not figures(2 * largest)["memory_fits"]


def test_absurd_batch_is_planned_in_bounded_time() -> None:
    recipe = Recipe.load("demo", {"train.batch_sequences": 2**50, "train.micro_batch_sequences": 2**50})
    figures = estimate(recipe, 4096, HARDWARE_SPECS["4090"], Assumptions()).figures
    assert 0 < figures["largest_micro_batch_sequences"] < 2**30
    assert not figures["memory_fits"]
