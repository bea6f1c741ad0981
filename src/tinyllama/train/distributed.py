"""Ranks: who this process is, and the model shared out among all of them.

One process trains unsharded. Under torchrun the weights, gradients and optimiser state are sharded by FSDP2, a block at
a time (Zhao et al. 2023, arXiv:2304.11277): gathered in the compute precision, gradients reduced in float32. With
`parallel.replicate` the shards lie within groups of ranks, and groups hold the same (HSDP).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from tinyllama.errors import RunStoppedError
from tinyllama.model.llama import Llama
from tinyllama.processes import die_with_torchrun
from tinyllama.recipe import Parallel
from tinyllama.train.rendezvous import unique_prefix_store

Value = TypeVar("Value")

_COLLECTIVE_TIMEOUT_FACTOR = 2.0
"""The watchdog ends a process that hangs (see `guard.py`); the collectives' own limit is this many times longer."""


@dataclass(frozen=True)
class World:
    """This process among all that train together."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0


@contextmanager
def init_distributed(watchdog_seconds: float) -> Iterator[World]:
    """Join the other processes of a torchrun, or be alone: gloo on a CPU; nccl on GPUs, with gloo for what is not."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    die_with_torchrun()
    if count == 1:
        yield World(0, 1, device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=_COLLECTIVE_TIMEOUT_FACTOR * watchdog_seconds)
    store, rank, count = next(dist.rendezvous("env://", timeout=timeout))
    try:
        store = unique_prefix_store(store, rank, count, timeout)
    except TimeoutError as error:
        remedy = (
            "see whether all have started and reach MASTER_ADDR, or raise guard.watchdog_seconds if they need longer"
        )
        words = f"{error} within {timeout.total_seconds():g} s (twice guard.watchdog_seconds)"
        raise RunStoppedError(f"rank {rank}: {words}; {remedy}") from None
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    try:
        yield World(rank, count, device)
    finally:
        dist.destroy_process_group()


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether an error says that another rank cannot be reached: gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def build_mesh(parallel: Parallel, ranks: World) -> DeviceMesh:
    """The ranks as FSDP2 wants them: [shard], or [replicate, shard] with neighbours in one shard group."""
    replicate, shard = parallel.mesh(ranks.count)
    if replicate == 1:
        return dist.init_device_mesh(ranks.device.type, (shard,), mesh_dim_names=("shard",))
    return dist.init_device_mesh(ranks.device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def shard_model(model: Llama, mesh: DeviceMesh) -> None:
    """Shard a model in place, also one on the meta device; its parameters become DTensors."""
    # Inputs stay as they are: the activations have the precision already, and the rotary table must keep float32.
    policy = MixedPrecisionPolicy(model.precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The root holds what is used first and last, so that it stays gathered between forward and backward.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "loss")


def broadcast_from_rank0(value: Value, ranks: World) -> Value:
    """The first rank's value, on all of them: what a disk shows may differ from rank to rank, and from time to time."""
    said = [value]
    if ranks.count > 1:
        dist.broadcast_object_list(said)
    return said[0]


def all_reduce_sum(value: Tensor, ranks: World) -> Tensor:
    """The sum of a tensor over all ranks, on each of them."""
    if ranks.count > 1:
        dist.all_reduce(value)
    return value
