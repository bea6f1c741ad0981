"""Commands before and during training: all stages at once, checks, estimates, training."""

import os
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from tinyllama.cli.next_command import after_training, echo_next
from tinyllama.formatting import echo
from tinyllama.plan.formulas import GPU_HOURS_BETWEEN_FAILURES
from tinyllama.recipe import Recipe

# Each command imports its modules when it runs, so that `tinyllama --help` does not wait for torch.
# ruff: noqa: PLC0415


def demo(recipe: Recipe) -> int:
    """Run all stages on the embedded corpus.

    The stages lead from raw text to a released, verified and evaluated model. The demo resumes if it was interrupted.

    Examples:
        tinyllama demo
        tinyllama demo --train.tokens 1M --name short

    """
    from tinyllama.processes import exit_on_signal

    with exit_on_signal():
        from tinyllama.stages import run_demo

        return run_demo(recipe)


def run(recipe: Recipe) -> int:
    """Run all stages of a recipe.

    The stages: train a tokenizer if there is none, prepare, train, release, verify, evaluate, and complete prompts. The
    command resumes if it was interrupted. The exit status is 1 if a check of `verify` fails.

    Examples:
        tinyllama run mine.yaml
        tinyllama run mine.yaml --name longer --train.tokens 20M

    """
    from tinyllama.processes import exit_on_signal

    with exit_on_signal():
        from tinyllama.stages import run_stages

        return run_stages(recipe)


def init(
    paths: Positional[Annotated[tuple[Path, ...], arg(metavar="PATH ...")]],
    minutes: float = 10,
    output: Annotated[Path | None, arg(metavar="FILE")] = None,
    force: bool = False,
) -> None:
    """Write a recipe for your folders and files.

    The command reads the beginnings of the files, finds their formats and text fields, measures this machine, and
    chooses the sizes. The recipe's comments give the reasons. `tinyllama run` then runs all stages.

    Examples:
        tinyllama init docs
        tinyllama init docs notes.jsonl --minutes 60 --output mine.yaml

    Args:
        paths: Folders and files with text: prose, code, JSON lines, parquet, csv, or data sets of Hugging Face.
        minutes: Time for training on this machine, in minutes.
        output: File of the recipe; by default NAME.yaml, with the name of the first path.
        force: Replace an existing file.
    """
    from tinyllama.drafting.show import init as write_recipe

    echo_next(Recipe.load(write_recipe([str(path) for path in paths], minutes, output, force)).command("run"))


def doctor(recipe: Recipe | None, json: bool = False) -> int:
    """Check this machine, and what a recipe needs.

    The exit status is 1 if a check fails.

    Examples:
        tinyllama doctor
        tinyllama doctor mine.yaml

    Args:
        json: Print the facts about the machine and the results of all checks as JSON.
    """
    from tinyllama.data.store import TokenStore
    from tinyllama.plan.doctor import show_doctor

    status = show_doctor(recipe, json)
    if recipe and not status and not json:
        echo_next(recipe.command("train" if TokenStore.exists(recipe.data.store) else "prepare"))
    return status


def plan(
    recipe: Recipe,
    hardware: Annotated[str | None, arg(metavar="GPU")] = None,
    gpus: int = 1,
    mfu: float | None = None,
    measure: bool = False,
    price: float | None = None,
    disk: float = 1e9,
    failure_hours: float = GPU_HOURS_BETWEEN_FAILURES,
    restart_minutes: float = 5.0,
    vocab_size: int | None = None,
    sweep: Annotated[str | None, arg(metavar="gpus=N,N,...")] = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Estimate memory, speed, duration, cost, disk and failures.

    Examples:
        tinyllama plan tinyllama-1.1b --hardware a100-40g --gpus 16
        tinyllama plan mine.yaml --hardware h100 --sweep gpus=8,16,64

    Args:
        hardware: a100-40g, a100-80g, h100, h100-pcie, h100-nvl, h200, h200-nvl, b200, l40s, 4090, 3090, v100-16g,
            v100-32g, v100-pcie-16g, v100-pcie-32g, t4 or cpu; this machine by default.
        gpus: Number of GPUs.
        mfu: Assumed model FLOPs utilization, as a fraction of the peak FLOP/s; by default an estimate for the GPU.
        measure: Measure the speed of a few layers on this machine instead of assuming an MFU.
        price: Price of a GPU-hour, in any currency.
        disk: Speed at which all ranks together write a checkpoint, in bytes per second.
        failure_hours: Mean number of GPU-hours between failures, in Llama 3's training by default.
        restart_minutes: Time from a failure to the next step, in minutes.
        vocab_size: Vocabulary size to assume instead of that of the tokenizer.
        sweep: Numbers of GPUs to compare.
        plot: PNG file for the plot of the sweep; by default plan-NAME.png, with the recipe's name.
        json: Print all numbers as JSON.
    """
    from tinyllama.plan.estimate import Assumptions
    from tinyllama.plan.show import show_plan

    assumptions = Assumptions(gpus, mfu, None, price, disk, failure_hours, restart_minutes)
    show_plan(recipe, hardware, assumptions, measure, sweep, plot, vocab_size, json)
    if not json:
        echo_next(recipe.command("doctor"))


def train(recipe: Recipe, allow_change: bool = False) -> None:
    """Train, or resume from the newest checkpoint.

    Under torchrun, all ranks train one model: `torchrun --nproc-per-node 8 -m tinyllama train RECIPE`.

    Examples:
        tinyllama train mine.yaml
        tinyllama train mine.yaml --name longer --train.tokens 20M

    Args:
        allow_change: Resume even if the recipe and the checkpoint differ in fields that affect the weights.
    """
    from tinyllama.processes import die_with_torchrun, exit_on_signal

    die_with_torchrun()
    with exit_on_signal():
        from tinyllama.api import train_model

        run = train_model(recipe, allow_change=allow_change)
    if os.environ.get("RANK", "0") == "0":  # under torchrun, every rank runs this function
        echo(f"run: {run.path}")
        echo_next(after_training(run.path))
