"""The most memory that a micro-batch takes on one of many ranks, as torch's FSDP2 memory tracker sees it.

    python tests/plan/tracking.py RECIPE RANKS '[{"FIELD": VALUE, ...}, ...]'

Nothing is computed and nothing sent: fake tensors, a fake process group. Prints bytes, one number for each mapping.
"""

import json
import sys
import types

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from tinyllama.model.llama import PRECISIONS, Llama
from tinyllama.recipe import Recipe
from tinyllama.train.distributed import World, build_mesh, shard_model
from tinyllama.train.optimizer import build_optimizers, optimizer_step


def peak_bytes(recipe: Recipe, count: int) -> int:
    """The peak in the second step, when gradients and the optimiser's state are there."""
    device = torch.device("cpu")
    mesh = build_mesh(recipe.parallel, World(0, count, device))
    with torch.device("meta"):
        model = Llama(recipe.model, 32_000, PRECISIONS[recipe.train.precision])
    model.set_activation_checkpointing(recipe.parallel.activation_checkpointing)
    shard_model(model, mesh)
    model.forward = types.MethodType(Llama.loss, model)  # type: ignore[method-assign]  # the tracker sees a module's calls alone
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        optimizers = build_optimizers(model, recipe.train.optimizer)
        with FSDPMemTracker(model, optimizers[-1]) as tracker:
            compute(model, recipe, tracker)
            optimizer_step(optimizers, 1e-4)
            # The update is left out: on fake tensors DTensor's own fake copies, as large as the whole, would count.
            tracker._peak_mem = dict.fromkeys(tracker._peak_mem, 0)
            compute(model, recipe, tracker)
            return tracker.get_tracker_snapshot("peak")[device]["Total"]


def compute(model: torch.nn.Module, recipe: Recipe, tracker: FSDPMemTracker) -> None:
    """A micro-batch, whose gradients stay: the next finds them, as all but a step's first do."""
    tracker.reset_mod_stats()
    ids = torch.zeros(recipe.train.micro_batch_sequences, recipe.train.sequence_length, dtype=torch.int64)
    model(ids, ids, 0.0).backward()


if __name__ == "__main__":
    name, ranks, cases = sys.argv[1:]
    dist.init_process_group("fake", rank=0, world_size=int(ranks), store=FakeStore())
    print(json.dumps([peak_bytes(Recipe.load(name, fields), int(ranks)) for fields in json.loads(cases)]))
