"""Program that computes gradients of a batch on one process and on all ranks: `micro_batches_program.py RECIPE CASES`.

CASES is JSON, a list of `{"fields": {FIELD: VALUE}, "memory": BYTES}`; `memory` is the memory that each device seems to
have. Rank 0 prints JSON, a result per case:

- `difference`: the largest relative difference of a parameter's gradient from that of one process
- `loss`: the relative difference of the losses
- `collectives`: the number of collectives of each kind in a step
- `is_sharded`: whether all weights and gradients are float32 shards after the step
- `graphs`: the number of graphs that torch.compile has made
- `rounding`: the largest relative difference of a gradient from that of micro-batches which are reduced one by one
"""

import json
import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from tinyllama import hardware
from tinyllama.distributed import World, init_distributed
from tinyllama.recipe import Recipe
from tinyllama.train.loop import forward_backward
from tinyllama.train.setup import build, initialize_weights


def run(path: str, case: dict[str, Any], world: World) -> dict[str, Any]:
    fields = {"train.optimizer.max_gradient_norm": 1e9} | case["fields"]  # nothing is clipped
    recipe = Recipe.load(path, fields)
    with mock.patch.object(hardware, "device_memory_bytes", return_value=case["memory"]):
        state = build(recipe, world)
    single = build(Recipe.load(path, fields | {"parallel.replicate": 1}), World(0, 1, world.device))
    generator = torch.Generator().manual_seed(1)
    size = (recipe.train.batch_sequences, recipe.train.sequence_length + 1)
    batch = torch.randint(state.model.vocab_size, size, generator=generator)
    starts = document_starts(batch[:, 1:], generator) if recipe.train.document_mask else None
    for each in (state, single):
        initialize_weights(each)
    counters.clear()
    expected, _ = forward_backward(single, batch, document_starts=starts)
    rows = batch.chunk(world.size)[world.rank]
    own = None if starts is None else starts.chunk(world.size)[world.rank]
    forward_backward(state, rows, document_starts=own)
    state.model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        nats, _ = forward_backward(state, rows, document_starts=own)
    torch.distributed.all_reduce(nats)
    parameters = list(state.model.parameters())
    is_sharded = all(
        isinstance(tensor, DTensor) and tensor.dtype == torch.float32
        for parameter in parameters
        for tensor in (parameter, parameter.grad)
    )
    gradients = full_gradients(state.model)
    result = {
        "difference": largest_difference(gradients, full_gradients(single.model)),
        "loss": abs(float(nats / expected) - 1),
        "collectives": {
            event.key.removeprefix("c10d::"): event.count
            for event in profiled.key_averages()
            if event.key.startswith("c10d::")
        },
        "is_sharded": is_sharded,
        "graphs": counters["stats"]["unique_graphs"],
    }
    state.model.zero_grad()
    state.keeps_weights = False
    forward_backward(state, rows, document_starts=own)
    return result | {"rounding": largest_difference(gradients, full_gradients(state.model))}


def document_starts(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Return the starts of documents that begin at random tokens."""
    begins = torch.rand(ids.shape, generator=generator) < 0.05
    return torch.where(begins, torch.arange(ids.shape[1]), 0).cummax(1).values.int()


def full_gradients(model: nn.Module) -> list[Tensor]:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    differences = [(gradient - other).norm() / other.norm() for gradient, other in zip(found, expected, strict=True)]
    return max(map(float, differences))


if __name__ == "__main__":
    with init_distributed(60) as joined:
        results = [run(sys.argv[1], case, joined) for case in json.loads(sys.argv[2])]
        if joined.is_main:
            print(json.dumps(results))
