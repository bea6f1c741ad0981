"""What `tinyllama plan` prints: which machine, which vocabulary, one plan or a sweep, as tables or as JSON."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tinyllama.errors import InputError
from tinyllama.formatting import echo
from tinyllama.hardware import HardwareSpec, get_hardware_spec
from tinyllama.model.flops import LLAMA_2_VOCAB_SIZE
from tinyllama.plan.estimate import Assumptions, Plan, estimate
from tinyllama.plan.sweep import parse_sweep, sweep_plot
from tinyllama.plan.tables import print_plan, print_rows, sweep_row
from tinyllama.preflight import recipe_warnings
from tinyllama.recipe import Recipe


def show_plan(
    recipe: Recipe, hardware: str | None, stated: Assumptions, measured: bool, sweep: str | None, plot: Path | None,
    vocab_size: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the plan of a recipe. Raises InputError where the machine, the batch or a number does not fit."""
    _check(stated, vocab_size)
    counts, picture = parse_sweep(sweep) if sweep else [], plot or Path(f"plan-{recipe.name}.png")
    if counts:
        _check_plot_path(picture)
    vocab_size = vocab_size or _vocab_size(recipe)
    machine, stated = _machine(recipe, hardware, stated, measured, vocab_size)
    for line in recipe_warnings(recipe, None if counts else stated.gpus):
        echo(line, to_stderr=True)
    if counts:
        _show_sweep(recipe, vocab_size, machine, stated, counts, picture, as_json)
        return
    plan = estimate(recipe, vocab_size, machine, stated)
    if as_json:
        echo(json.dumps(plan.as_json(), indent=2, allow_nan=False))
    else:
        print_plan(plan, _console())


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=False)


def _check(stated: Assumptions, vocab_size: int | None) -> None:
    limits: dict[str, tuple[float, float, float, str]] = {
        "--gpus": (stated.gpus, 1, 1e6, "how many there are"),
        "--mfu": (stated.mfu, 1e-6, 1, "a share such as 0.5"),
        "--price": (stated.price_per_gpu_hour or 0, 0, 1e6, "an amount of money"),
        "--disk": (stated.disk_bytes_per_second, 1e3, 1e18, "bytes a second such as 2e9"),
        "--failure-hours": (stated.gpu_hours_between_failures, 1e-3, 1e12, "GPU-hours such as 50e3"),
        "--restart-minutes": (stated.restart_minutes, 0, 1e6, "minutes such as 5"),
        "--vocab-size": (1 if vocab_size is None else vocab_size, 1, 1e9, "a number of pieces"),
    }
    for flag, (value, least, most, right) in limits.items():
        if not least <= value <= most:
            raise InputError(f"{flag} {value}: give {right}")


def _check_plot_path(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--plot {path}: give a file in a folder that is there")


def _vocab_size(recipe: Recipe) -> int:
    """Of the recipe's tokenizer; Llama 2's where that is not here yet, which is said."""
    if Path(recipe.tokenizer).exists():
        from tinyllama.tokenizer import Tokenizer  # noqa: PLC0415 - only where it is needed

        return Tokenizer.load(recipe.tokenizer).vocab_size
    echo(f"{recipe.tokenizer}: not here yet; planned with {LLAMA_2_VOCAB_SIZE:,} pieces (--vocab-size)", to_stderr=True)
    return LLAMA_2_VOCAB_SIZE


def _machine(
    recipe: Recipe, hardware: str | None, stated: Assumptions, measured: bool, vocab_size: int
) -> tuple[HardwareSpec, Assumptions]:
    """The row to plan with: the one named, else this machine's; measured on it if asked to."""
    if hardware and not measured:
        return get_hardware_spec(hardware), stated
    from tinyllama.plan.measure import measure_speed, this_machine  # noqa: PLC0415 - torch

    here = this_machine()
    if here is None:
        remedy = "leave out --measure and name" if measured else "name"
        raise InputError(f"--hardware: this machine's GPU is not in the table; {remedy} the one that is most like it")
    if not measured:
        return here, stated
    if hardware and hardware != here.name:
        raise InputError(f"--hardware {hardware}: --measure measures this machine, {here.name}; leave out one of them")
    if here.is_cpu and stated.gpus > 1:
        raise InputError(f"--gpus {stated.gpus}: processes would share this CPU; --measure it with one")
    found = measure_speed(recipe, vocab_size, stated.gpus)
    if here.is_cpu:
        here = replace(here, bf16_flops=found.peak_flops, fp32_flops=found.peak_flops)
    return here, replace(stated, measured_seconds=(found.micro_batch_seconds, found.update_seconds))


def _show_sweep(
    recipe: Recipe,
    vocab_size: int,
    machine: HardwareSpec,
    stated: Assumptions,
    counts: list[int],
    path: Path,
    as_json: bool,
) -> None:
    plans: dict[int, Plan | str] = {}
    for count in counts:
        try:
            plans[count] = estimate(recipe, vocab_size, machine, replace(stated, gpus=count))
        except InputError as problem:
            plans[count] = str(problem)
    found = [(count, plan.figures) for count, plan in plans.items() if isinstance(plan, Plan)]
    if not found:
        raise InputError(f"--sweep: {next(iter(plans.values()))}")
    sweep_plot(f"{recipe.name} on {machine.name}", found, path)
    if as_json:
        told = {count: plan.as_json() if isinstance(plan, Plan) else {"problem": plan} for count, plan in plans.items()}
        echo(json.dumps(told, indent=2, allow_nan=False))
        return
    head = ("GPUs", "tokens/s", "time", "GPU-hours", "cost", "GB a GPU", "traffic hides", "failures")
    rows = [(f"{count:,}", *sweep_row(figures)) for count, figures in found]
    print_rows(f"{recipe.name} on {machine.name}", head, rows, _console())
    for count, plan in plans.items():
        if isinstance(plan, str):
            rows_wanted = -(-recipe.train.batch_sequences // count) * count
            echo(f"{count:,} GPUs: {plan}, such as --train.batch_sequences {rows_wanted}")
    echo(f"plot: {path}")
