"""Estimates of a recipe's model size, memory, time, network, disk and failures. The import does not load torch.

Each figure is computed from the recipe, the machine's specification and the user's assumptions. `default_assumptions`
lists the assumptions that have their default values.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.files import disk_usage_bytes
from tinyllama.hardware import HardwareSpec
from tinyllama.model.flops import flops_per_token, num_parameters, parameters_by_part
from tinyllama.plan.formulas import (
    GPU_HOURS_BETWEEN_FAILURES,
    Workload,
    failure_overhead,
    memory_by_component,
    network_seconds,
    optimizer_bytes,
    traffic_bytes,
)
from tinyllama.recipe import ActivationCheckpointing, Recipe, Source
from tinyllama.release.formats import release_bytes
from tinyllama.strict_json import without_nan
from tinyllama.tokenizer import token_dtype

HEADROOM = 0.92
"""Fraction of the memory that may be filled; the rest is for CUDA, NCCL's buffers and fragmentation."""
_CPU_RUNTIME_BYTES = 700_000_000
"""Memory of Python, torch and the compiler in a process that trains on a CPU."""
_COPY_BYTES_PER_SECOND = 10e9
"""Bytes per second at which a checkpoint is copied to the host's memory, over PCIe or within the memory."""
# Number of tokens of the two data sets with Llama 2's tokenizer. TinyLlama's tokenised data took 1.8 TB at two bytes
# per token. The mixture weights of its training were 0.693584 and 0.306416 (TinyLlama, README and
# pretrain/tinyllama.py).
_PUBLISHED_TOKENS = {"slimpajama": 0.693584 * 900e9, "starcoderdata": 0.306416 * 900e9}
# Fraction of SlimPajama's bytes in each subset (cerebras/SlimPajama-627B, data set card). The token counts above
# exclude the GitHub subset.
_SUBSET_FRACTIONS = {
    "RedPajamaCommonCrawl": 0.522, "RedPajamaC4": 0.267, "RedPajamaGithub": 0.052, "RedPajamaBook": 0.042,
    "RedPajamaArXiv": 0.046, "RedPajamaWikipedia": 0.038, "RedPajamaStackExchange": 0.033,
}  # fmt: skip
_TEXT_BYTES_PER_TOKEN = 4.0
_COMPRESSION_RATIO = 3.0


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a plan that are not in the recipe. Each is set by a flag or has a default."""

    gpus: int = 1
    mfu: float | None = None
    """MFU as a fraction; None means the estimate of the GPU's hardware spec."""
    measured_seconds: tuple[float, float] | None = None
    """Measured time per micro-batch and per optimizer step on this machine, in seconds. These times replace the MFU."""
    price_per_gpu_hour: float | None = None
    disk_bytes_per_second: float = 1e9
    """Speed at which all ranks together write a checkpoint."""
    gpu_hours_between_failures: float = GPU_HOURS_BETWEEN_FAILURES
    restart_minutes: float = 5.0
    """Time from a failure to the next step, in minutes."""


@dataclass(frozen=True)
class Plan:
    """The estimated needs of a recipe on a given number of GPUs."""

    hardware: HardwareSpec
    assumptions: Assumptions
    recipe: Recipe
    vocab_size: int
    workload: Workload
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the figures, the assumptions and the machine for JSON output; infinite figures are None."""
        about = {"name": self.recipe.name, "hardware": asdict(self.hardware), "assumptions": asdict(self.assumptions)}
        defaults = {"defaults": self.default_assumptions, "vocab_size": self.vocab_size}
        return {**about, **defaults, **without_nan(self.figures)}

    @property
    def default_assumptions(self) -> dict[str, Any]:
        """Assumptions that affect the figures and have their default values."""
        names = ["gpu_hours_between_failures", "restart_minutes", "disk_bytes_per_second"]
        defaults = asdict(Assumptions())
        found = {name: defaults[name] for name in names if getattr(self.assumptions, name) == defaults[name]}
        is_mfu_assumed = self.assumptions.mfu is None and not self.assumptions.measured_seconds
        return found | ({"mfu": self.hardware.assumed_mfu} if is_mfu_assumed else {})

    @property
    def mfu(self) -> float:
        """The assumed MFU, as a fraction."""
        return self.hardware.assumed_mfu if self.assumptions.mfu is None else self.assumptions.mfu

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return num_parameters(self.workload.model, self.vocab_size)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: float32 weights and the optimizer's state."""
        return 4 * self.parameters + optimizer_bytes(self.workload)


def estimate(recipe: Recipe, vocab_size: int, spec: HardwareSpec, assumptions: Assumptions) -> Plan:
    """Estimate the needs of a recipe. Raises InputError if the batch or the mesh cannot be divided among the GPUs."""
    train, gpus, spec = recipe.train, assumptions.gpus, spec.per_process(assumptions.gpus)
    replicas, shards = recipe.parallel.mesh(gpus)
    workload = Workload(
        model=recipe.model,
        vocab_size=vocab_size,
        sequences=train.effective_micro_batch_size(gpus),
        rank_sequences=train.sequences_per_rank(gpus),
        length=train.sequence_length,
        shards=shards,
        replicas=replicas,
        device_memory_bytes=spec.memory_bytes,
        optimizer=train.optimizer,
        element_bytes=4 if train.precision == "fp32" else 2,
        activation_checkpointing=recipe.parallel.activation_checkpointing,
        compiled=train.compile,
        float8=train.float8,
        is_cpu=spec.is_cpu,
        copies_heads=train.precision != "bf16" and not spec.is_cpu,
    )
    plan = Plan(spec, assumptions, recipe, vocab_size, workload)
    time = _time(plan)
    return replace(plan, figures=_size(plan) | _memory(plan) | time | _disk(plan) | _failures(plan, time))


def _size(plan: Plan) -> dict[str, Any]:
    model, train = plan.workload.model, plan.recipe.train
    flops, tokens = flops_per_token(model, plan.vocab_size, train.sequence_length), train.steps * train.batch_tokens
    return {
        "parameters": plan.parameters,
        "parameters_by_part": parameters_by_part(model, plan.vocab_size),
        "flops_per_token": flops,
        "tokens": tokens,
        "steps": train.steps,
        "total_flops": tokens * flops,
    }


def _memory(plan: Plan) -> dict[str, Any]:
    workload, available = plan.workload, HEADROOM * plan.hardware.memory_bytes
    runtime = {"runtime": _CPU_RUNTIME_BYTES} if workload.is_cpu else {}
    components = memory_by_component(workload) | runtime
    copied = plan.checkpoint_bytes // workload.shards if plan.recipe.checkpoint.asynchronous else 0
    if workload.is_cpu:  # the copy from which a checkpoint is written is in the same memory as the model
        available -= copied

    def total(**changes: Any) -> int:
        return sum((memory_by_component(replace(workload, **changes)) | runtime).values())

    sequences = workload.rank_sequences
    bound = 1
    while bound < sequences and total(sequences=bound) <= available:
        bound *= 2
    divisors = (count for count in range(min(bound, sequences), 0, -1) if sequences % count == 0)
    return {
        "memory_bytes_per_gpu": sum(components.values()),
        "memory_bytes_by_component": components,
        "checkpoint_copy_bytes": copied,
        "memory_bytes_by_activation_checkpointing": {
            choice: total(activation_checkpointing=choice) for choice in get_args(ActivationCheckpointing)
        },
        "usable_memory_bytes": available,
        "keeps_weights": workload.keeps_weights,
        "memory_fits": sum(components.values()) <= available,
        "micro_batch_sequences": workload.sequences,
        "largest_micro_batch_sequences": next((count for count in divisors if total(sequences=count) <= available), 0),
    }


def _time(plan: Plan) -> dict[str, Any]:
    assumptions, spec, train, workload = plan.assumptions, plan.hardware, plan.recipe.train, plan.workload
    flops, peak = flops_per_token(workload.model, plan.vocab_size, workload.length), spec.peak_flops(train.precision)
    compute, update = assumptions.measured_seconds or (workload.tokens * flops / (peak * plan.mfu), 0.0)
    # With replicas or kept weights, ranks communicate more in the last micro-batch of a step than in the earlier ones.
    micro_batches = ((workload.micro_batches - 1, False), (1, True))
    networks = [(count, network_seconds(workload, spec, is_last)) for count, is_last in micro_batches]
    step = sum(count * max(compute, network) for count, network in networks) + update / workload.shards
    per_gpu = train.batch_tokens / assumptions.gpus / step
    return {
        "tokens_per_second_per_gpu": per_gpu,
        "tokens_per_second": per_gpu * assumptions.gpus,
        "mfu": per_gpu * flops / peak,
        "step_seconds": step,
        "days": train.steps * step / 86400,
        "gpu_hours": train.steps * step / 3600 * assumptions.gpus,
        "network_bytes_per_step": sum(count * traffic_bytes(workload, is_last) for count, is_last in micro_batches),
        "network_seconds_per_step": sum(count * network for count, network in networks),
        "network_is_hidden": max(network for count, network in networks if count) <= compute,
    }


def _disk(plan: Plan) -> dict[str, Any]:
    recipe, checkpoint = plan.recipe, plan.checkpoint_bytes
    store, known_from = store_size(recipe, plan.vocab_size)
    release, milestones = release_bytes(recipe.release.formats, plan.parameters), len(recipe.milestone_steps())
    num_checkpoints = min(recipe.checkpoint.keep, recipe.train.steps) + milestones + 1  # one is being written
    return {
        "store_bytes": store,
        "store_bytes_from": known_from,
        "checkpoint_bytes": checkpoint,
        "checkpoints_bytes": checkpoint * num_checkpoints,
        "release_bytes": release,
        "releases_bytes": release * max(1, milestones),
        "checkpoint_seconds": checkpoint / plan.assumptions.disk_bytes_per_second,
    }


def _failures(plan: Plan, time: Mapping[str, Any]) -> dict[str, Any]:
    assumptions, step, checkpoint = plan.assumptions, time["step_seconds"], plan.recipe.checkpoint
    write = plan.checkpoint_bytes / assumptions.disk_bytes_per_second
    stall = plan.checkpoint_bytes / plan.workload.shards / _COPY_BYTES_PER_SECOND if checkpoint.asynchronous else write
    overhead = failure_overhead(
        run_hours=24 * time["days"],
        gpus=assumptions.gpus,
        interval_seconds=checkpoint.every_steps * step,
        stall_seconds=stall,
        write_seconds=write,
        gpu_hours_between_failures=assumptions.gpu_hours_between_failures,
        restart_seconds=60 * assumptions.restart_minutes,
    )
    gpu_hours = time["gpu_hours"] + assumptions.gpus * overhead["lost_hours"]
    return overhead | {
        "checkpoint_stall_seconds": stall,
        "days_with_losses": time["days"] + overhead["lost_hours"] / 24,
        "gpu_hours_with_losses": gpu_hours,
        "cost": None if assumptions.price_per_gpu_hour is None else gpu_hours * assumptions.price_per_gpu_hour,
        "best_checkpoint_every_steps": max(1, round(overhead["best_checkpoint_seconds"] / step)),
    }


def store_size(recipe: Recipe, vocab_size: int) -> tuple[int, str]:
    """Return the size of the token store in bytes, and a description of how the size was determined.

    The size of a complete store is measured. Otherwise, the size is estimated per source. A source of unknown size is
    assumed to have as many tokens as the run reads from it.
    """
    store = Path(recipe.data.store)
    if TokenStore.exists(store):
        return disk_usage_bytes(store), "its files"
    sources = recipe.data.sources
    total_weight = sum(source.weight for source in sources.values())
    parents = {Path(source.path).parent for source in sources.values()}
    is_embedded_corpus = len(parents) == 1 and all(
        Path(source.path).name == name == source.format for name, source in sources.items()
    )
    tokens, bases = 0.0, set()
    for name, source in sources.items():
        published = None if is_embedded_corpus else _published_tokens(source)
        if raw := _raw_text_bytes(name, source):
            tokens += raw / _TEXT_BYTES_PER_TOKEN
            bases.add("the raw files' sizes, 4 bytes per token")
        elif published is not None:
            tokens += published
            bases.add("the data sets' published sizes")
        else:
            tokens += recipe.train.tokens * source.weight / total_weight
            bases.add("what the run reads")
    return round(tokens * token_dtype(vocab_size).itemsize), " and ".join(sorted(bases))


def _raw_text_bytes(name: str, source: Source) -> float:
    """Return the bytes of text in a source's local files (estimated for compressed files), or 0 without files."""
    try:
        from tinyllama.prepare.sources import COMPRESSIONS, list_files  # noqa: PLC0415 - needs pyarrow

        files = [] if "://" in source.path else list_files(name, source)
    except (InputError, ModuleNotFoundError):  # not downloaded yet, or a machine that only trains and has no pyarrow
        return 0.0
    is_compressed = [Path(file.path).suffix.lower() in {*COMPRESSIONS, ".parquet"} for file in files]
    ratios = [_COMPRESSION_RATIO if compressed else 1.0 for compressed in is_compressed]
    return sum(file.size * ratio for file, ratio in zip(files, ratios, strict=True))


def _published_tokens(source: Source) -> float | None:
    if source.format != "slimpajama":
        return _PUBLISHED_TOKENS.get(source.format)
    kept = 1 - sum(_SUBSET_FRACTIONS[name] for name in source.exclude)
    return _PUBLISHED_TOKENS["slimpajama"] * kept / (1 - _SUBSET_FRACTIONS["RedPajamaGithub"])
