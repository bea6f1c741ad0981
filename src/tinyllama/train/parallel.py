"""Ranks: who this process is, and the model shared out among all of them.

One process trains unsharded. Under torchrun the weights, gradients and optimiser state are sharded by FSDP2, a block at
a time (Zhao et al. 2023, arXiv:2304.11277): gathered in the compute precision, gradients reduced in float32.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tinyllama.model.llama import Llama


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other processes of a torchrun, or be alone: gloo on a CPU, nccl on GPUs."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if count == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()


def shard(model: Llama, ranks: Ranks) -> None:
    """Shard a model that every rank holds alike, in place; nothing to do for one rank."""
    if ranks.count == 1:
        return
    mesh = dist.init_device_mesh(ranks.device.type, (ranks.count,))
    policy = MixedPrecisionPolicy(param_dtype=model.precision, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def sum_over_ranks(value: Tensor, ranks: Ranks) -> Tensor:
    """The sum of a tensor over all ranks, on each of them."""
    if ranks.count > 1:
        dist.all_reduce(value)
    return value
