"""What a recipe will need on a machine: the parts of the plan put together. Reads the recipe, imports no torch.

Every figure follows from the recipe, the machine's row and what the user states; what is left at its default is named
in `assumptions`, so that no figure stands without its ground.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from tinyllama.hardware import HardwareSpec
from tinyllama.model.flops import flops_by_formula, num_parameters, parameters_by_part
from tinyllama.plan import disk, failures
from tinyllama.plan.memory import Workload, logits_bytes, memory_by_component, optimizer_bytes
from tinyllama.plan.speed import network_seconds, replica_traffic_bytes, shard_traffic_bytes, speed
from tinyllama.recipe import Recipe

Formula = Literal["causal", "full", "6N", "6N+full"]

HEADROOM = 0.92
"""Of a GPU's memory that may be filled; the rest is for CUDA, NCCL's buffers and gaps between tensors."""
CPU_RUNTIME_BYTES = 700_000_000
"""Python, torch and the compiler in a process's memory on a CPU."""
_COPY_BYTES_PER_SECOND = 10e9  # a checkpoint's copy to the host's memory, over PCIe or within it


@dataclass(frozen=True)
class Assumptions:
    """What a plan is told, or assumes where the user says nothing."""

    gpus: int = 1
    mfu: float = 0.5
    formula: Formula = "causal"
    """Which operations that MFU counts."""
    measured_seconds: tuple[float, float] | None = None
    """Of a micro-batch and of an update, measured on this machine; then no MFU is needed."""
    price_per_gpu_hour: float | None = None
    disk_bytes_per_second: float = 1e9
    """At which all ranks together write a checkpoint."""
    gpu_hours_between_failures: float = failures.GPU_HOURS_BETWEEN_FAILURES
    restart_minutes: float = 5.0
    """From a failure to the next step."""


@dataclass(frozen=True)
class Plan:
    """The whole plan of a recipe on a number of GPUs; `as_json` gives its keys."""

    machine: HardwareSpec
    stated: Assumptions
    recipe: Recipe
    vocab_size: int
    load: Workload
    replicas: int
    micro_batches: int
    """Of one rank in a step."""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Every figure, with what it was told and the machine's row."""
        about = {"name": self.recipe.name, "hardware": asdict(self.machine), "stated": asdict(self.stated)}
        figures = {name: _or_none(value) for name, value in self.figures.items()}
        return about | {"assumptions": self.assumptions, "vocab_size": self.vocab_size, **figures}

    @property
    def assumptions(self) -> dict[str, Any]:
        """What was left at its default, and matters: the MFU does not where the time was measured."""
        names = ["gpu_hours_between_failures", "restart_minutes", "disk_bytes_per_second"]
        names += [] if self.stated.measured_seconds else ["mfu"]
        defaults = asdict(Assumptions())
        return {name: defaults[name] for name in names if getattr(self.stated, name) == defaults[name]}


def _or_none(value: Any) -> Any:
    """JSON has no number for what is not finite: a run that never ends."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def estimate(recipe: Recipe, vocab_size: int, machine: HardwareSpec, stated: Assumptions) -> Plan:
    """Plan a recipe. Raises InputError where its batch or its mesh does not fit the number of GPUs."""
    train, gpus, machine = recipe.train, stated.gpus, machine.per_process(stated.gpus)
    replicas, shards = recipe.parallel.mesh(gpus)
    rows = train.sequences_per_rank(gpus)
    load = Workload(
        recipe.model, vocab_size, train.effective_micro_batch_size(gpus), train.sequence_length, shards,
        train.optimizer,
        2 if train.precision == "bf16" else 4, recipe.parallel.activation_checkpointing, train.compile, machine.is_cpu,
    )  # fmt: skip
    plan = Plan(machine, stated, recipe, vocab_size, load, replicas, rows // load.sequences)
    time = _time(plan)
    return replace(plan, figures=_size(plan) | _memory(plan) | time | _disk(plan) | _failure_overhead(plan, time))


def _size(plan: Plan) -> dict[str, Any]:
    shape, vocab_size, train = plan.load.shape, plan.vocab_size, plan.recipe.train
    flops = flops_by_formula(shape, vocab_size, train.sequence_length)
    return {
        "parameters": num_parameters(shape, vocab_size),
        "parameters_by_part": parameters_by_part(shape, vocab_size),
        "flops_per_token": flops["causal"],
        "flops_per_token_by_formula": flops,
        "tokens": train.steps * train.batch_tokens,
        "steps": train.steps,
        "total_flops": train.steps * train.batch_tokens * flops["causal"],
    }


def _memory(plan: Plan) -> dict[str, Any]:
    parts = memory_parts(plan, plan.load)
    copied = checkpoint_bytes(plan) // plan.load.shards if plan.recipe.checkpoint.asynchronous else 0
    room = HEADROOM * plan.machine.memory_bytes
    if plan.machine.is_cpu:  # where the copy from which a checkpoint is written lies too
        room -= copied
    choices = {
        how: sum(memory_parts(plan, replace(plan.load, recompute=how)).values())
        for how in ("none", "selective", "full")
    }
    return {
        "memory_bytes_per_gpu": sum(parts.values()),
        "memory_bytes_by_component": parts,
        "logits_bytes": logits_bytes(plan.load),
        "checkpoint_copy_bytes": copied,
        "memory_bytes_by_activation_checkpointing": choices,
        "memory_fits": sum(parts.values()) <= room,
        "micro_batch_sequences": plan.load.sequences,
        "largest_micro_batch_sequences": _largest_micro_batch(plan, room),
    }


def memory_parts(plan: Plan, load: Workload) -> dict[str, int]:
    """Bytes by component; on a CPU also the process itself."""
    return memory_by_component(load) | ({"runtime": CPU_RUNTIME_BYTES} if plan.machine.is_cpu else {})


def _largest_micro_batch(plan: Plan, room: float) -> int:
    """The most rows at a time that divide a rank's and fit; 0 where not even one does."""
    rows = plan.load.sequences * plan.micro_batches
    for count in sorted((count for count in range(1, rows + 1) if rows % count == 0), reverse=True):
        if sum(memory_parts(plan, replace(plan.load, sequences=count)).values()) <= room:
            return count
    return 0


def _time(plan: Plan) -> dict[str, Any]:
    stated, machine, train, load = plan.stated, plan.machine, plan.recipe.train, plan.load
    flops, peak = flops_by_formula(load.shape, plan.vocab_size, load.length), machine.peak_flops(train.precision)
    compute = load.tokens * flops[stated.formula] / (peak * stated.mfu)
    compute, update = stated.measured_seconds or (compute, 0.0)
    traffic = network_seconds(load, plan.replicas, machine)
    found = speed(compute, update / load.shards, plan.micro_batches, traffic)
    per_gpu = train.batch_tokens / stated.gpus / found.step_seconds
    seconds = train.steps * found.step_seconds
    gpu_hours = seconds / 3600 * stated.gpus
    bytes_in = shard_traffic_bytes(load) + replica_traffic_bytes(load, plan.replicas)
    return {
        "tokens_per_second_per_gpu": per_gpu,
        "tokens_per_second": per_gpu * stated.gpus,
        "mfu": per_gpu * flops["causal"] / peak,
        "mfu_by_formula": {name: per_gpu * count / peak for name, count in flops.items()},
        "step_seconds": found.step_seconds,
        "days": seconds / 86400,
        "gpu_hours": gpu_hours,
        "network_bytes_per_step": bytes_in * plan.micro_batches,
        "network_seconds_per_step": traffic * plan.micro_batches,
        "network_hides": found.is_overlapped,
    }


def checkpoint_bytes(plan: Plan) -> int:
    """One checkpoint: the float32 weights and what the optimiser knows."""
    return 4 * num_parameters(plan.load.shape, plan.vocab_size) + optimizer_bytes(plan.load)


def _disk(plan: Plan) -> dict[str, Any]:
    recipe, one = plan.recipe, checkpoint_bytes(plan)
    store, known_from = disk.store_size(recipe, plan.vocab_size)
    release = disk.release_bytes(recipe.release.formats, num_parameters(plan.load.shape, plan.vocab_size))
    return {
        "store_bytes": store,
        "store_bytes_from": known_from,
        "checkpoint_bytes": one,
        "checkpoints_bytes": disk.checkpoints_bytes(recipe, one),
        "release_bytes": release,
        "releases_bytes": release * max(1, len(recipe.milestone_steps())),
        "checkpoint_seconds": one / plan.stated.disk_bytes_per_second,
    }


def _failure_overhead(plan: Plan, time: Mapping[str, Any]) -> dict[str, Any]:
    stated, one = plan.stated, checkpoint_bytes(plan)
    write = one / stated.disk_bytes_per_second
    stall = one / plan.load.shards / _COPY_BYTES_PER_SECOND if plan.recipe.checkpoint.asynchronous else write
    interval = plan.recipe.checkpoint.every_steps * time["step_seconds"]
    found = failures.failure_overhead(
        24 * time["days"], stated.gpus, interval, stall, write, stated.gpu_hours_between_failures,
        60 * stated.restart_minutes,
    )  # fmt: skip
    paid_hours = time["gpu_hours"] + stated.gpus * found.lost_hours
    watts, price = plan.machine.watts, stated.price_per_gpu_hour
    return {
        "checkpoint_stall_seconds": stall,
        "expected_failures": found.expected_failures,
        "lost_hours": found.lost_hours,
        "days_with_losses": time["days"] + found.lost_hours / 24,
        "gpu_hours_with_losses": paid_hours,
        "energy_kilowatt_hours": None if watts is None else paid_hours * watts / 1000,
        "cost": None if price is None else paid_hours * price,
        "best_checkpoint_seconds": found.best_interval_seconds,
        "best_checkpoint_every_steps": max(1, round(found.best_interval_seconds / time["step_seconds"])),
        "lost_hours_at_best": found.lost_hours_at_best,
    }
