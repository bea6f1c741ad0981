"""Prints the peak memory of a micro-batch on one of many ranks, as torch's FSDP2 memory tracker computes it.

    python tests/plan/fsdp_memory.py RECIPE RANKS '[[{"FIELD": VALUE, ...}, KEEPS_WEIGHTS], ...]'

Uses fake tensors and a fake process group: nothing is computed or sent. Prints the bytes for each set of fields.
"""

import json
import sys
import types

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from tinyllama.distributed import World, begin_micro_batch, build_mesh, shard_model
from tinyllama.model.llama import PRECISIONS, Llama
from tinyllama.recipe import Recipe
from tinyllama.train.setup import build_optimizers, optimizer_step


def peak_bytes(recipe: Recipe, ranks: int, keeps_weights: bool) -> int:
    """Return the peak in the second step, when gradients and the optimizer's state exist."""
    device = torch.device("cpu")
    mesh = build_mesh(recipe.parallel, World(0, ranks, device))
    with torch.device("meta"):
        model = Llama(recipe.model, 32_000, PRECISIONS[recipe.train.precision])
    model.set_activation_checkpointing(recipe.parallel.activation_checkpointing)
    shard_model(model, mesh, keeps_weights)
    model.forward = types.MethodType(Llama.loss, model)  # type: ignore[method-assign]  # only forward is tracked
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        optimizers = build_optimizers(model, recipe.train.optimizer)
        with FSDPMemTracker(model, optimizers[-1]) as tracker:
            run_micro_batch(model, recipe, tracker)
            optimizer_step(optimizers, 1e-4)
            # Exclude the update: on fake tensors DTensor makes fake copies as large as the unsharded weights.
            tracker._peak_mem = dict.fromkeys(tracker._peak_mem, 0)
            if keeps_weights:
                model.zero_grad()
                begin_micro_batch(model, False, True)
                run_micro_batch(model, recipe, tracker)
                begin_micro_batch(model, True, True)
            run_micro_batch(model, recipe, tracker)
            return tracker.get_tracker_snapshot("peak")[device]["Total"]


def run_micro_batch(model: torch.nn.Module, recipe: Recipe, tracker: FSDPMemTracker) -> None:
    """Run a micro-batch and keep its gradients, as all micro-batches of a step except the first find them."""
    tracker.reset_mod_stats()
    ids = torch.zeros(recipe.train.micro_batch_sequences, recipe.train.sequence_length, dtype=torch.int64)
    model(ids, ids, 0.0).backward()


if __name__ == "__main__":
    name, ranks, cases = sys.argv[1:]
    dist.init_process_group("fake", rank=0, world_size=int(ranks), store=FakeStore())
    print(json.dumps([peak_bytes(Recipe.load(name, fields), int(ranks), keeps) for fields, keeps in json.loads(cases)]))
