"""Distributed training: the rendezvous of the processes, and the sharding of the model among them.

A single process trains an unsharded model. Under torchrun, FSDP2 (Zhao et al. 2023, arXiv:2304.11277) shards weights,
gradients and optimizer state block by block. It gathers weights in the compute precision and reduces gradients in
float32. `parallel.replicate` sets the number of groups of ranks. The ranks of a group together hold all shards, so the
groups are replicas (HSDP).
"""

import gc
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from tinyllama import hardware
from tinyllama.errors import InputError, RunStoppedError, SavedInterrupt, first_line
from tinyllama.model.llama import Llama
from tinyllama.model.weights import load_parameters
from tinyllama.processes import die_with_torchrun
from tinyllama.recipe import Parallel

Value = TypeVar("Value")

_COLLECTIVE_TIMEOUT_FACTOR = 2.0
"""Timeout of collectives, in multiples of `guard.watchdog_seconds`; above 1, since the watchdog must act first."""
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class World:
    """Rank and device of this process, and the number of processes that train together."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta | None = None
    """Timeout of collectives; None in a world of one process."""

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, the only rank that prints output and writes the run's files."""
        return self.rank == 0


@contextmanager
def init_distributed(watchdog_seconds: float) -> Iterator[World]:
    """Join torchrun's process group until the block ends; without torchrun, yield a world of one process.

    The backend is gloo for tensors on CPUs and nccl for tensors on GPUs. Raises RunStoppedError if a rank does not join
    in time, and InputError if some ranks have a GPU and others do not.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = select_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    die_with_torchrun()
    if size == 1:
        yield World(0, 1, device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=_COLLECTIVE_TIMEOUT_FACTOR * watchdog_seconds)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    try:
        store = unique_prefix_store(store, rank, size, timeout)
    except TimeoutError as error:
        problem = f"{error} within {timeout.total_seconds():g} s (twice guard.watchdog_seconds)"
        remedy = "check that all ranks have started and can reach MASTER_ADDR, or raise guard.watchdog_seconds"
        raise RunStoppedError(f"rank {rank}: {problem}; {remedy}") from None
    check_same_device_type(store, rank, device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    ranks_end_together = False
    try:
        yield World(rank, size, device, timeout)
        ranks_end_together = True
    except (RunStoppedError, SavedInterrupt) as error:
        ranks_end_together = isinstance(error, SavedInterrupt) or bool(error.signal)
        raise
    finally:
        # The training loop contains a reference cycle, which keeps process groups and their threads alive. A thread
        # that releases a tensor while the interpreter exits could abort the process.
        gc.collect()
        # NCCL's groups wait for the other ranks, which may be blocked in a collective after an error on this rank. This
        # rank would then never print its error. At the interpreter's exit, torch aborts these groups instead of
        # waiting.
        if ranks_end_together or device.type == "cpu":
            dist.destroy_process_group()


def select_device(local_rank: int) -> torch.device:
    """Return the rank's GPU, or the CPU if the machine has no GPU or CUDA_VISIBLE_DEVICES is empty.

    Raises InputError if the machine has fewer GPUs than ranks. Also raises InputError if torch cannot use the machine's
    NVIDIA GPU, because computing on the CPU would be very slow.
    """
    if torch.cuda.is_available():
        if local_rank >= (count := torch.cuda.device_count()):
            problem = f"torch finds {count} GPU{'s' * (count > 1)} for local rank {local_rank}"
            raise InputError(f"CUDA: {problem}; start one rank per GPU: torchrun --nproc-per-node {count}")
        device = torch.device("cuda", local_rank)
        _check_kernels(device)
        return device
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not hardware.nvidia_devices():
        return torch.device("cpu")
    try:
        torch.cuda.init()
        reason = "CUDA_VISIBLE_DEVICES names none of the GPUs"
    except (AssertionError, RuntimeError) as error:
        reason = first_line(error)
    problem = f"torch {torch.__version__} cannot use this machine's NVIDIA GPU ({reason})"
    remedy = "install a torch that fits the driver (docs/gpu.md), or set CUDA_VISIBLE_DEVICES= to use the CPU"
    raise InputError(f"CUDA: {problem}; {remedy}")


def _check_kernels(device: torch.device) -> None:
    """Raise InputError if torch's kernels are built only for newer GPUs, for example those of CUDA 13 on a V100."""
    capability = torch.cuda.get_device_capability(device)
    built = [int(digits[1]) for name in torch.cuda.get_arch_list() if (digits := re.match(r"sm_(\d+)", name))]
    if 10 * capability[0] + capability[1] < min(built, default=0):
        gpu = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
        remedy = "install torch for an older CUDA version (docs/gpu.md), or set CUDA_VISIBLE_DEVICES= to use the CPU"
        raise InputError(f"CUDA: torch {torch.__version__} has no kernels for {gpu}; {remedy}")


def check_same_device_type(store: dist.Store, rank: int, device: torch.device) -> None:
    """Raise InputError if this rank's device type differs from that of rank 0."""
    store.set(f"device/{rank}", device.type)
    if (main_type := store.get("device/0").decode()) != device.type:
        problem = f"trains on {device.type}, but rank 0 on {main_type}"
        raise InputError(f"rank {rank}: {problem}; run `tinyllama doctor` on both machines")


def unique_prefix_store(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Return a view of torchrun's store with a prefix that is unique to this launch and shared by all `size` ranks.

    After a restart, the store still contains the addresses of processes that have ended (pytorch issue 135712), so each
    launch needs its own prefix. The restart count differs between nodes, so it cannot identify a launch. Instead, each
    rank requests the launch's prefix with a random number and accepts only the answer to that number. Raises
    TimeoutError if a rank does not join.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    prefix = _publish_prefix(store, size, deadline) if rank == 0 else _receive_prefix(store, rank, deadline)
    return dist.PrefixStore(prefix, store)


def _publish_prefix(store: dist.Store, size: int, deadline: float) -> str:
    """Answer the newest request of each other rank until all these ranks have acknowledged the prefix."""
    prefix = uuid.uuid4().hex
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"request/{rank}"]):
                store.set(f"answer/{rank}", f"{store.get(f'request/{rank}').decode()} {prefix}")
            if store.check([f"acknowledged/{rank}"]) and store.get(f"acknowledged/{rank}").decode() == prefix:
                missing.discard(rank)
        _wait(deadline, f"ranks {sorted(missing)[:8]} did not join")
    return prefix


def _receive_prefix(store: dist.Store, rank: int, deadline: float) -> str:
    """Request the prefix, wait for the answer to this request, and acknowledge the prefix."""
    request = uuid.uuid4().hex
    store.set(f"request/{rank}", request)
    while True:
        if store.check([f"answer/{rank}"]):
            answered, prefix = store.get(f"answer/{rank}").decode().split()
            if answered == request:
                store.set(f"acknowledged/{rank}", prefix)
                return prefix
        _wait(deadline, "rank 0 did not answer")


def _wait(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(problem)
    time.sleep(_POLL_SECONDS)


def is_peer_failure(error: BaseException) -> bool:
    """Return whether an error means that another rank is unreachable.

    For an unreachable rank, gloo raises a plain RuntimeError, whose message contains `gloo`.
    """
    if isinstance(error, RunStoppedError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def build_mesh(parallel: Parallel, world: World) -> DeviceMesh:
    """Return the device mesh for FSDP2: [shard] or [replicate, shard], with consecutive ranks in each shard group.

    Raises InputError if shard x replicate is not the number of ranks.
    """
    replicate, shard = parallel.mesh(world.size)
    if replicate == 1:
        return dist.init_device_mesh(world.device.type, (shard,), mesh_dim_names=("shard",))
    mesh = dist.init_device_mesh(world.device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    if world.timeout:  # otherwise the mesh's groups would have torch's default timeout
        for group in mesh.get_all_groups():
            dist.distributed_c10d._set_pg_timeout(world.timeout, group)
    return mesh


def smallest_device_memory(world: World) -> int:
    """Return the memory of the smallest device of all ranks, in bytes; the value is the same on each rank."""
    ranks_of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    memory = torch.tensor(hardware.device_memory_bytes(world.device, ranks_of_machine), device=world.device)
    if world.size > 1:
        dist.all_reduce(memory, dist.ReduceOp.MIN)
    return int(memory)


def shard_model(model: Llama, mesh: DeviceMesh, keeps_weights: bool = False) -> None:
    """Shard a model, which may be on the meta device, in place; its parameters become DTensors.

    If `keeps_weights` is true, blocks stay gathered after a forward pass; see `begin_micro_batch`.
    """
    # Inputs are not cast: activations already have the compute precision, and the rotary table must stay in float32.
    policy = MixedPrecisionPolicy(model.precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not keeps_weights)
    # The root module has the parameters that are used first and last, so they stay gathered after the forward pass.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for name in ("loss", "next_logits"):
        register_fsdp_forward_method(model, name)


def begin_micro_batch(model: Llama, is_last: bool, keeps_weights: bool) -> None:
    """Set what FSDP communicates in the next micro-batch of a step; without FSDP, do nothing.

    If `keeps_weights` is true, all weights stay gathered until the backward pass of the step's last micro-batch, and
    unsharded float32 gradients accumulate until then. Otherwise, each micro-batch gathers weights and reduces gradients
    within its shard group, and only the last one all-reduces them over the replicas.
    """
    if not isinstance(model, FSDPModule):
        return
    if keeps_weights:
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last)
    else:
        model.set_requires_all_reduce(is_last)


@torch.no_grad()
def gather_model(model: Llama, precision: torch.dtype) -> Llama:
    """Return an unsharded copy of a model in evaluation mode, with weights and activations in the dtype `precision`.

    The copy has plain layers, without torch.compile and float8. All ranks call this function, and each rank gets the
    copy on its device.
    """
    with torch.device("meta"):
        copy = Llama(model.config, model.vocab_size, precision).to(precision)
    weights = ((name, weight.to(precision)) for name, weight in model.state_dict().items())
    full = ((name, weight.full_tensor() if isinstance(weight, DTensor) else weight) for name, weight in weights)
    load_parameters(copy.to_empty(device=model.device), full)
    return copy.eval()


def kept_cast_weights(model: Llama, keeps_weights: bool) -> AbstractContextManager[None]:
    """Cast the weights once for a block of micro-batches if `keeps_weights` is true; FSDP casts when it gathers."""
    casts = keeps_weights and not isinstance(model, FSDPModule)
    return model.cast_weights_once() if casts else nullcontext()


def broadcast_from_rank0(value: Value, world: World) -> Value:
    """Return rank 0's value on all ranks, for example a value read from a disk, which could differ between ranks."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values)
    return values[0]


def all_reduce_sum(value: Tensor, world: World) -> Tensor:
    """Return the sum of a tensor over all ranks, on each rank."""
    if world.size > 1:
        dist.all_reduce(value)
    return value
