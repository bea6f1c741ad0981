"""A plan as tables for a terminal, or as plain aligned lines elsewhere."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from tinyllama.formatting import format_bytes, format_duration, format_duration_precise
from tinyllama.plan.estimate import HEADROOM, Plan

Rows = Sequence[tuple[str, str]]

_NAMES = {
    "embedding": "input embedding", "attention": "attention", "feed_forward": "feed-forward", "norms": "norms",
    "head": "output head", "weights": "weights, float32", "gradients": "gradients, float32", "optimizer": "optimiser",
    "activations": "activations", "weight_copies": "the weights once more, in bf16", "gathered": "all-gathered weights",
    "logits": "logits", "backward": "backward pass of a block", "reduce_scatter": "reduce-scatter buffers",
    "runtime": "Python, torch, compiler",
}  # fmt: skip
_HEAD_MEMORY = "last norm, head's gradient"


def print_plan(plan: Plan, console: Console) -> None:
    """Print a plan, a table a subject."""
    sections: dict[str, Rows] = {
        "Model": _model(plan),
        f"Memory of one {_unit(plan)}": _memory(plan),
        "Time": _time(plan),
        "Network": _network(plan),
        "Disk": _disk(plan),
        "Failures": _failures(plan),
    }
    console.print(f"{plan.recipe.name} on {plan.stated.gpus} x {plan.machine.name} ({plan.machine.source})")
    for title, rows in sections.items():
        if rows:
            console.print(_table(title, ("", ""), rows))


def print_rows(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """Print one table of several columns."""
    console.print(_table(title, head, rows))


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=any(head)
    )
    for place, name in enumerate(head):
        table.add_column(name, justify="left" if place == 0 or not any(head) else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _unit(plan: Plan) -> str:
    return "process" if plan.machine.is_cpu else "GPU"


def _model(plan: Plan) -> Rows:
    found = plan.figures
    parts = [(f"  {_NAMES[name]}", f"{count:,}") for name, count in found["parameters_by_part"].items() if count]
    formula = "6 x (parameters less the input embedding) + 6 x layers x dim x sequence length"
    return [
        ("parameters", f"{found['parameters']:,}"),
        *parts,
        ("tokens", f"{found['tokens']:,} in {found['steps']:,} steps of {plan.recipe.train.batch_tokens:,}"),
        ("operations a token", f"{found['flops_per_token']:,} = {formula}"),
        ("operations in all", f"{found['total_flops']:.3g}"),
    ]


def _memory(plan: Plan) -> Rows:
    found, room = plan.figures, plan.machine.memory_bytes
    names = _NAMES | {"head": _HEAD_MEMORY}
    rows = [(f"  {names[name]}", format_bytes(count)) for name, count in found["memory_bytes_by_component"].items()]
    how = plan.load.recompute
    totals = found["memory_bytes_by_activation_checkpointing"].items()
    others = [(f"in all with activation checkpointing {name}", format_bytes(n)) for name, n in totals if name != how]
    if "logits" not in found["memory_bytes_by_component"]:
        others.append(("logits, at another moment", format_bytes(found["logits_bytes"])))
    fits = "fits" if found["memory_fits"] else "DOES NOT FIT"
    words = f"{format_bytes(found['memory_bytes_per_gpu'])} of {format_bytes(room)}: {fits}"
    return [
        (f"micro-batch of {plan.load.sequences} x {plan.load.length:,} tokens, {plan.micro_batches} a step", words),
        *rows,
        *others,
        ("the host's, while a checkpoint is written", f"{format_bytes(found['checkpoint_copy_bytes'])} more at most"),
        (f"largest micro-batch in {HEADROOM:.0%} of it", f"{found['largest_micro_batch_sequences']} sequences"),
    ]


def _time(plan: Plan) -> Rows:
    found, stated = plan.figures, plan.stated
    measured = stated.measured_seconds is not None
    ground = "measured here" if measured else f"at an MFU of {stated.mfu:.1%} by the formula {stated.formula}"
    formulas = ", ".join(f"{name} {share:.1%}" for name, share in found["mfu_by_formula"].items())
    rows = [
        ("tokens/s a GPU" if not plan.machine.is_cpu else "tokens/s a process",
         f"{found['tokens_per_second_per_gpu']:,.0f} ({ground})"),
        ("tokens/s in all", f"{found['tokens_per_second']:,.0f}"),
        ("MFU by formula", formulas),
        ("a step", format_duration_precise(found["step_seconds"])),
        ("the run", f"{format_duration(86_400 * found['days'])}, {found['gpu_hours']:,.1f} {_unit(plan)}-hours"),
    ]  # fmt: skip
    rows += _cost_rows(plan)
    return rows


def _cost_rows(plan: Plan) -> Rows:
    """Of all hours, those too that failures cost."""
    found, rows = plan.figures, []
    if found["energy_kilowatt_hours"] is not None:
        rows.append(("energy of the boards, at most", f"{found['energy_kilowatt_hours']:,.0f} kWh"))
    if found["cost"] is not None:
        rows.append((f"cost at {plan.stated.price_per_gpu_hour:g} a GPU-hour", f"{found['cost']:,.2f}"))
    return rows


def _network(plan: Plan) -> Rows:
    found = plan.figures
    if plan.stated.gpus == 1:
        return []
    hides = "hides behind computing" if found["network_hides"] else "DOES NOT HIDE: training waits for it"
    replicas = f", {plan.replicas} replicas" if plan.replicas > 1 else ""
    return [
        ("sharding", f"{plan.load.shards} shards{replicas}"),
        ("a GPU receives in a step", format_bytes(found["network_bytes_per_step"])),
        ("which takes", f"{found['network_seconds_per_step']:.3g} s of {found['step_seconds']:.3g} s: {hides}"),
    ]


def _disk(plan: Plan) -> Rows:
    found, stated = plan.figures, plan.stated
    speed = f"{stated.disk_bytes_per_second / 1e9:g} GB/s"
    return [
        ("token store", f"{format_bytes(found['store_bytes'])} (by {found['store_bytes_from']})"),
        ("a checkpoint", f"{format_bytes(found['checkpoint_bytes'])}, {found['checkpoint_seconds']:.3g} s at {speed}"),
        ("all checkpoints, milestones too", format_bytes(found["checkpoints_bytes"])),
        ("a release, all releases", f"{format_bytes(found['release_bytes'])}, {format_bytes(found['releases_bytes'])}"),
    ]


def _failures(plan: Plan) -> Rows:
    found, stated = plan.figures, plan.stated
    every = plan.recipe.checkpoint.every_steps
    best = f"every {found['best_checkpoint_every_steps']:,} steps, {format_duration(found['best_checkpoint_seconds'])}"
    rate = f"one in {stated.gpu_hours_between_failures:,.0f} GPU-hours, {stated.restart_minutes:g} minutes to restart"
    return [
        ("expected", f"{found['expected_failures']:.3g} ({rate})"),
        (f"lost with a checkpoint every {every:,} steps", _hours(found["lost_hours"])),
        ("best interval", f"{best}: {_hours(found['lost_hours_at_best'])} lost"),
        ("the run with what is lost", _hours(24 * found["days_with_losses"])),
        ("assumed, for want of a flag", _format_assumptions(plan)),
    ]


def _hours(count: float) -> str:
    return format_duration(3600 * count) if math.isfinite(count) else "for ever: it would fail before every checkpoint"


def _format_assumptions(plan: Plan) -> str:
    flags = {"mfu": "--mfu", "gpu_hours_between_failures": "--failure-hours", "restart_minutes": "--restart-minutes",
             "disk_bytes_per_second": "--disk"}  # fmt: skip
    return ", ".join(f"{flags[name]} {value:g}" for name, value in plan.assumptions.items()) or "nothing"


def sweep_row(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """One number of GPUs in the table of a sweep."""
    cost = "" if figures["cost"] is None else f"{figures['cost']:,.0f}"
    return (
        f"{figures['tokens_per_second']:,.0f}",
        _hours(24 * figures["days_with_losses"]),
        f"{figures['gpu_hours_with_losses']:,.0f}",
        cost,
        f"{figures['memory_bytes_per_gpu'] / 1e9:.1f}",
        "yes" if figures["network_hides"] else "no",
        f"{figures['expected_failures']:.1f}",
    )
