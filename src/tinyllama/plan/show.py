"""The output of `tinyllama plan`: one plan or a sweep over numbers of GPUs, as tables or as JSON."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tinyllama.errors import InputError
from tinyllama.formatting import echo, format_bytes, format_duration, format_duration_precise, format_table, print_json
from tinyllama.hardware import HardwareSpec, check_bf16, get_hardware_spec
from tinyllama.model.flops import LLAMA_2_VOCAB_SIZE
from tinyllama.plan.estimate import HEADROOM, Assumptions, Plan, estimate
from tinyllama.preflight import recipe_warnings
from tinyllama.recipe import Recipe

Rows = Iterator[tuple[str, str]]

_COMPONENTS = {
    "embedding": "input embedding", "attention": "attention", "feed_forward": "feed-forward", "norms": "norms",
    "head": "output head", "weights": "weights, float32", "gradients": "gradients, float32", "optimizer": "optimizer",
    "activations": "activations", "weight_copies": "16-bit copy of the weights", "gathered": "all-gathered weights",
    "logits": "logits", "backward": "backward pass of a block", "reduce_scatter": "reduce-scatter buffers",
    "muon": "temporary tensors of Muon", "runtime": "Python, torch, compiler",
}  # fmt: skip
_FLAGS = {
    "mfu": "--mfu", "gpu_hours_between_failures": "--failure-hours", "restart_minutes": "--restart-minutes",
    "disk_bytes_per_second": "--disk",
}  # fmt: skip


def show_plan(
    recipe: Recipe, hardware: str | None, assumptions: Assumptions, measured: bool, sweep: str | None,
    plot: Path | None, vocab_size: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the plan of a recipe.

    Raises InputError if the batch or a flag's value is invalid, or if the hardware is unknown or does not support the
    recipe's precision.
    """
    _check_flags(assumptions, vocab_size)
    counts, plot = parse_sweep(sweep) if sweep else [], plot or Path(f"plan-{recipe.name}.png")
    if counts and (plot.is_dir() or not plot.parent.is_dir()):
        raise InputError(f"--plot {plot}: not a file in an existing folder; give another path")
    vocab_size = vocab_size or _vocab_size(recipe)
    spec, assumptions = resolve_hardware(recipe, hardware, assumptions, measured, vocab_size)
    for warning in recipe_warnings(recipe, None if counts else assumptions.gpus):
        echo(warning, to_stderr=True)

    def plan_for(gpus: int) -> Plan:
        return estimate(recipe, vocab_size, spec, replace(assumptions, gpus=gpus))

    if counts:
        _show_sweep(recipe, plan_for, counts, plot, as_json)
        return
    plan = plan_for(assumptions.gpus)
    if as_json:
        print_json(plan.as_json())
        return
    echo(f"{recipe.name} on {assumptions.gpus} x {spec.name} ({spec.source})")
    unit = "process" if spec.is_cpu else "GPU"
    _print_table("Model", _model_rows(plan))
    _print_table(f"Memory of one {unit}", _memory_rows(plan))
    _print_table("Time", _time_rows(plan, unit))
    if assumptions.gpus > 1:
        _print_table("Network", _network_rows(plan))
    _print_table("Disk", _disk_rows(plan))
    _print_table("Failures", _failure_rows(plan))


def parse_sweep(text: str) -> list[int]:
    """Parse `gpus=8,16,64` into sorted numbers of GPUs. Raises InputError for any other format."""
    name, _, values = text.partition("=")
    counts = values.split(",")
    if name != "gpus" or not all(count.isascii() and count.isdecimal() and int(count) > 0 for count in counts):
        raise InputError(f"--sweep {text}: not a list of GPU counts; give one such as gpus=8,16,64,512")
    return sorted({int(count) for count in counts})


def _check_flags(assumptions: Assumptions, vocab_size: int | None) -> None:
    limits: dict[str, tuple[float, float, float, str]] = {
        "--gpus": (assumptions.gpus, 1, 1e6, "a number of GPUs"),
        "--mfu": (0.5 if assumptions.mfu is None else assumptions.mfu, 1e-6, 1, "a fraction such as 0.5"),
        "--price": (assumptions.price_per_gpu_hour or 0, 0, 1e6, "an amount of money"),
        "--disk": (assumptions.disk_bytes_per_second, 1e3, 1e18, "bytes per second such as 2e9"),
        "--failure-hours": (assumptions.gpu_hours_between_failures, 1e-3, 1e12, "GPU-hours such as 50e3"),
        "--restart-minutes": (assumptions.restart_minutes, 0, 1e6, "minutes such as 5"),
        "--vocab-size": (1 if vocab_size is None else vocab_size, 1, 1e9, "a vocabulary size"),
    }
    for flag, (value, least, most, expected) in limits.items():
        if not least <= value <= most:
            raise InputError(f"{flag} {value}: out of range; give {expected}")


def _vocab_size(recipe: Recipe) -> int:
    """Return the vocabulary size of the recipe's tokenizer.

    If the tokenizer does not exist yet, return the recipe's `vocab_size`, or Llama 2's size without it.
    """
    if Path(recipe.tokenizer).exists():
        from tinyllama.tokenizer import Tokenizer  # noqa: PLC0415 - most plans do not need this import

        return Tokenizer.load(recipe.tokenizer).vocab_size
    if recipe.vocab_size:
        return recipe.vocab_size
    assumed = f"assuming a vocabulary of {LLAMA_2_VOCAB_SIZE:,} (--vocab-size)"
    echo(f"{recipe.tokenizer}: not found; {assumed}", to_stderr=True)
    return LLAMA_2_VOCAB_SIZE


def resolve_hardware(
    recipe: Recipe, hardware: str | None, assumptions: Assumptions, measured: bool, vocab_size: int
) -> tuple[HardwareSpec, Assumptions]:
    """Return the hardware specification and the assumptions, which contain measured times if `measured` is true."""
    if hardware and not measured:
        return _check_precision(recipe, get_hardware_spec(hardware)), assumptions
    from tinyllama.plan.measure import detect_hardware, measure_speed  # noqa: PLC0415 - imports torch

    here = detect_hardware()
    if here is None:
        remedy = "drop --measure and name" if measured else "name"
        raise InputError(f"--hardware: this machine's GPU is not in the table; {remedy} the most similar GPU")
    _check_precision(recipe, here)
    if not measured:
        return here, assumptions
    if hardware and hardware != here.name:
        raise InputError(f"--hardware {hardware}: --measure measures this machine, {here.name}; drop one of the flags")
    if here.is_cpu and assumptions.gpus > 1:
        raise InputError(f"--gpus {assumptions.gpus}: several processes would share this CPU; measure with --gpus 1")
    micro_batch, update, peak = measure_speed(recipe, vocab_size, assumptions.gpus)
    if here.is_cpu:
        here = replace(here, bf16_flops=peak, fp32_flops=peak)
    return here, replace(assumptions, measured_seconds=(micro_batch, update))


def _check_precision(recipe: Recipe, spec: HardwareSpec) -> HardwareSpec:
    """Return the hardware specification if it supports the recipe's precision. Raises InputError otherwise."""
    train = recipe.train
    if not spec.is_cpu:
        check_bf16(train.precision, train.optimizer.name, spec.name, spec.capability)
    elif train.precision == "fp16":
        problem = "a plan for fp16 needs a GPU, because fp16 is very slow on most CPUs"
        raise InputError(f"train.precision: {problem}; name a GPU with --hardware, or use --train.precision bf16")
    return spec


def _show_sweep(recipe: Recipe, plan_for: Callable[[int], Plan], counts: list[int], plot: Path, as_json: bool) -> None:
    """Print and plot the plans for several numbers of GPUs; `plan_for` returns the plan for one number."""
    plans: dict[int, Plan] = {}
    problems: dict[int, InputError] = {}
    for count in counts:
        try:
            plans[count] = plan_for(count)
        except InputError as problem:
            problems[count] = problem
    if not plans:
        raise InputError(f"--sweep: {next(iter(problems.values()))}")
    from tinyllama.plots.charts import sweep_plot  # noqa: PLC0415 - takes a second

    title = f"{recipe.name} on {next(iter(plans.values())).hardware.name}"
    sweep_plot(title, {count: plan.figures for count, plan in plans.items()}, plot)
    if as_json:
        results = {count: plan.as_json() for count, plan in plans.items()}
        results |= {count: {"problem": str(refusal)} for count, refusal in problems.items()}
        print_json({count: results[count] for count in counts})
        return
    head = ("GPUs", "tokens/s", "time", "GPU-hours", "cost", "GB per GPU", "network hidden", "failures")
    _print_table(title, [_sweep_row(plan) for plan in plans.values()], head)
    for count, refusal in problems.items():
        divisible = -(-recipe.train.batch_sequences // count) * count
        echo(f"{count:,} GPUs: {refusal}, such as --train.batch_sequences {divisible}")
    echo(f"plot: {plot}")


def _sweep_row(plan: Plan) -> tuple[str, ...]:
    figures = plan.figures
    return (
        f"{plan.assumptions.gpus:,}",
        f"{figures['tokens_per_second']:,.0f}",
        _format_hours(24 * figures["days_with_losses"]),
        f"{figures['gpu_hours_with_losses']:,.0f}",
        "" if figures["cost"] is None else f"{figures['cost']:,.0f}",
        f"{figures['memory_bytes_per_gpu'] / 1e9:.1f}",
        "yes" if figures["network_is_hidden"] else "no",
        f"{figures['expected_failures']:.1f}",
    )


def _print_table(title: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ("", "")) -> None:
    lines = format_table(head, rows, title=title, right=head[1:] if any(head) else (), max_width=160)
    print("\n".join(lines))  # noqa: T201 - the lines are escaped, and `echo` would escape their colour codes


def _model_rows(plan: Plan) -> Rows:
    figures = plan.figures
    yield "parameters", f"{figures['parameters']:,}"
    for name, count in figures["parameters_by_part"].items():
        if count:
            yield f"  {_COMPONENTS[name]}", f"{count:,}"
    yield "tokens", f"{figures['tokens']:,} in {figures['steps']:,} steps of {plan.recipe.train.batch_tokens:,}"
    # a tied embedding is also the output head, whose product is counted
    multiplied = "parameters" if plan.recipe.model.tie_embeddings else "(parameters - input embedding)"
    formula = f"6 x {multiplied} + 6 x layers x heads x head_dim x sequence length"
    yield "FLOPs per token", f"{figures['flops_per_token']:,} = {formula}"
    yield "FLOPs in total", f"{figures['total_flops']:.3g}"


def _memory_rows(plan: Plan) -> Rows:
    figures, workload = plan.figures, plan.workload
    names = _COMPONENTS | {"head": "last norm, head's gradient"}
    sizes = f"{format_bytes(figures['memory_bytes_per_gpu'])} of {format_bytes(plan.hardware.memory_bytes)}"
    micro_batch = f"micro-batch of {workload.sequences} x {workload.length:,} tokens, {workload.micro_batches} per step"
    yield micro_batch, f"{sizes}: {'fits' if figures['memory_fits'] else 'DOES NOT FIT'}"
    for name, count in figures["memory_bytes_by_component"].items():
        yield f"  {names[name]}", format_bytes(count)
    for choice, total in figures["memory_bytes_by_activation_checkpointing"].items():
        if choice != workload.activation_checkpointing:
            yield f"in total with activation checkpointing {choice}", format_bytes(total)
    yield "host memory while a checkpoint is written", f"up to {format_bytes(figures['checkpoint_copy_bytes'])} more"
    yield f"largest micro-batch in {HEADROOM:.0%} of it", f"{figures['largest_micro_batch_sequences']} sequences"


def _time_rows(plan: Plan, unit: str) -> Rows:
    figures, assumptions = plan.figures, plan.assumptions
    basis = "measured here" if assumptions.measured_seconds else f"at an MFU of {plan.mfu:.1%}"
    yield f"tokens/s per {unit}", f"{figures['tokens_per_second_per_gpu']:,.0f} ({basis})"
    yield "tokens/s in total", f"{figures['tokens_per_second']:,.0f}"
    yield "MFU", f"{figures['mfu']:.1%}"
    yield "step", format_duration_precise(figures["step_seconds"])
    yield "run", f"{format_duration(86_400 * figures['days'])}, {figures['gpu_hours']:,.1f} {unit}-hours"
    if figures["cost"] is not None:
        yield f"cost at {assumptions.price_per_gpu_hour:g} per GPU-hour", f"{figures['cost']:,.2f}"


def _network_rows(plan: Plan) -> Rows:
    figures = plan.figures
    hides = "hidden behind compute" if figures["network_is_hidden"] else "NOT HIDDEN: training waits for it"
    workload = plan.workload
    replicas = f", {workload.replicas} replicas" if workload.replicas > 1 else ""
    once = ", weights gathered and gradients reduced once per step" if workload.keeps_weights else ""
    yield "sharding", f"{workload.shards} shards{replicas}{once}"
    yield "received per GPU and step", format_bytes(figures["network_bytes_per_step"])
    yield "time", f"{figures['network_seconds_per_step']:.3g} s of {figures['step_seconds']:.3g} s: {hides}"


def _disk_rows(plan: Plan) -> Rows:
    figures, speed = plan.figures, f"{format_bytes(plan.assumptions.disk_bytes_per_second)}/s"
    names = ("store", "checkpoint", "checkpoints", "release", "releases")
    sizes = {name: format_bytes(figures[f"{name}_bytes"]) for name in names}
    yield "token store", f"{sizes['store']} (by {figures['store_bytes_from']})"
    yield "checkpoint", f"{sizes['checkpoint']}, {figures['checkpoint_seconds']:.3g} s at {speed}"
    yield "all checkpoints, milestones included", sizes["checkpoints"]
    yield "release, all releases", f"{sizes['release']}, {sizes['releases']}"


def _failure_rows(plan: Plan) -> Rows:
    figures, given, every = plan.figures, plan.assumptions, plan.recipe.checkpoint.every_steps
    lost, least_lost = _format_hours(figures["lost_hours"]), _format_hours(figures["lost_hours_at_best"])
    rate = f"one per {given.gpu_hours_between_failures:,.0f} GPU-hours, {given.restart_minutes:g} minutes to restart"
    best = f"{figures['best_checkpoint_every_steps']:,} steps, {format_duration(figures['best_checkpoint_seconds'])}"
    defaults = ", ".join(f"{_FLAGS[name]} {value:g}" for name, value in plan.default_assumptions.items())
    yield "expected", f"{figures['expected_failures']:.3g} ({rate})"
    yield f"lost with a checkpoint every {every:,} steps", lost
    yield "best interval", f"every {best}: {least_lost} lost"
    yield "run with lost time", _format_hours(24 * figures["days_with_losses"])
    yield "assumed by default", defaults or "nothing"


def _format_hours(count: float) -> str:
    return format_duration(3600 * count) if math.isfinite(count) else "never finishes: it fails before every checkpoint"
