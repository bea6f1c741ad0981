"""Prints the peak memory of a micro-batch on one of many ranks, as torch's FSDP2 memory tracker computes it.

    python tests/plan/fsdp_memory.py RECIPE RANKS '[[{"FIELD": VALUE, ...}, KEEPS_WEIGHTS], ...]'

Uses fake tensors and a fake process group: nothing is computed or sent. Prints the bytes for each set of fields. If the
optimizer is Muon, prints the peak of the temporary memory in Muon's update instead.
"""

import json
import sys
import types
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from tinyllama.distributed import World, begin_micro_batch, build_mesh, shard_model
from tinyllama.model import attention, llama, loss
from tinyllama.model.flops import loss_chunk_tokens
from tinyllama.model.llama import PRECISIONS, Llama
from tinyllama.recipe import Recipe
from tinyllama.train.setup import build_optimizers, optimizer_step


def peak_bytes(recipe: Recipe, ranks: int, keeps_weights: bool) -> int:
    """Return the peak in the second step, when gradients and the optimizer's state exist.

    The loss uses the chunks of a GPU.
    """
    device = torch.device("cpu")
    # In bf16, the operator for CPUs saves the same tensors as the flash kernel on a GPU.
    is_bf16 = recipe.train.precision == "bf16"
    vars(llama)["causal_attention"] = attention.causal_attention if is_bf16 else attention._fused_attention
    mesh = build_mesh(recipe.parallel, World(0, ranks, device))
    with torch.device("meta"):
        model = Llama(recipe.model, 32_000, PRECISIONS[recipe.train.precision])
    model.set_activation_checkpointing(recipe.parallel.activation_checkpointing)
    shard_model(model, mesh, keeps_weights)
    model.forward = types.MethodType(Llama.loss, model)  # type: ignore[method-assign]  # only forward is tracked
    gpu_chunks = patch.multiple(
        loss, loss_chunk_tokens=lambda vocab_size, is_cpu: loss_chunk_tokens(vocab_size, False), CPU_SOFTMAX_CHUNK=2**62
    )
    with gpu_chunks, FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        optimizers = build_optimizers(model, recipe.train.optimizer)
        if recipe.train.optimizer.name == "muon":
            return bytes_of_update(model, optimizers[0])
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


def bytes_of_update(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the peak of the temporary memory in the second update."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        optimizer.step()
        now, peak = (tracker.get_tracker_snapshot(kind)[torch.device("cpu")]["Total"] for kind in ("current", "peak"))
        return peak - now


def run_micro_batch(model: torch.nn.Module, recipe: Recipe, tracker: FSDPMemTracker) -> None:
    """Run a micro-batch and keep its gradients, as all micro-batches of a step except the first find them."""
    tracker.reset_mod_stats()
    ids = torch.zeros(recipe.train.micro_batch_sequences, recipe.train.sequence_length, dtype=torch.int64)
    model(ids, ids, 0.0).backward()


if __name__ == "__main__":
    name, ranks, cases = sys.argv[1:]
    dist.init_process_group("fake", rank=0, world_size=int(ranks), store=FakeStore())
    print(json.dumps([peak_bytes(Recipe.load(name, fields), int(ranks), keeps) for fields, keeps in json.loads(cases)]))
