"""Command line: one short function per command. The functions call other modules.

A command that takes a recipe also accepts each field of the recipe as a flag: `tinyllama train demo --train.tokens 5M`.
Wrong input causes exit status 2 and one line on standard error.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tinyllama.cli_arguments import parse, parse_with_recipe, pop_quiet_flag
from tinyllama.errors import InputError, run_and_get_exit_status, translate_damage_errors
from tinyllama.formatting import echo, visible
from tinyllama.plan.formulas import GPU_HOURS_BETWEEN_FAILURES
from tinyllama.progress import set_quiet
from tinyllama.recipe import Recipe

# Each command imports its modules when it runs, so that `tinyllama --help` does not wait for torch.
# ruff: noqa: PLC0415


def demo(recipe: Recipe) -> int:
    """Run every stage on the embedded corpus: from raw text to a released, verified and evaluated model."""
    from tinyllama.processes import exit_on_signal

    with exit_on_signal():
        from tinyllama.demo import run_demo

        return run_demo(recipe)


def corpus(directory: Positional[Path]) -> None:
    """Write the embedded corpus: text of the installed Python and its packages in SlimPajama and Starcoderdata format.

    Args:
        directory: Folder in which `slimpajama/` and `starcoderdata/` are created.
    """
    from tinyllama.prepare.corpus import write_corpus

    for folder, sizes in write_corpus(directory).items():
        for name, size in sizes.items():
            echo(f"{directory / folder}: {name}: {size:,} bytes")


def tokenizer_train(recipe: Recipe, vocab_size: int = 8192, sample_bytes: int = 16_000_000) -> None:
    """Train a Llama-style BPE tokenizer on the recipe's sources and save it in the folder that the recipe names.

    Args:
        vocab_size: Vocabulary size, including 3 special tokens and 256 byte tokens.
        sample_bytes: Bytes of text to train on, sampled from the sources in proportion to their weights.
    """
    from tinyllama.prepare.selection import train_recipe_tokenizer

    folder, text = train_recipe_tokenizer(recipe, vocab_size, sample_bytes)
    echo(f"tokenizer: {folder}\n    {text}")


def tokenizer_import(source: Positional[str], directory: Positional[Path]) -> None:
    """Convert a tokenizer.model to a tokenizer folder, and check that the ids equal those of SentencePiece.

    Args:
        source: A tokenizer.model file, or a folder or hub repository that contains one.
        directory: Output folder.
    """
    from tinyllama.tokenizer import Tokenizer

    Tokenizer.load(source).save(directory)
    echo(f"tokenizer: {directory}")


def prepare(recipe: Recipe, strict: bool = False) -> None:
    """Tokenize every source into the token store, or resume an interrupted run.

    Args:
        strict: Fail with exit status 2 if a file contains no usable row, or if most of its rows are rejected.
    """
    from tinyllama.api import prepare_store
    from tinyllama.prepare.inspection import prepared_lines

    store = prepare_store(recipe, strict)
    if store is None:
        echo(f"{recipe.data.store}: submitted to Slurm; its last job finishes the store")
        return
    for line in prepared_lines(store):
        echo(line)


def inspect_store(
    store: Positional[Path],
    verify: bool = False,
    recipe: str | None = None,
    step: int | None = None,
    row: int | None = None,
    tokenizer: str | None = None,
) -> int:
    """Show a token store's counts, mixture, dropped rows and samples; verify the store; or trace a training sequence.

    Args:
        store: Folder of the store.
        verify: Check every hash and list damaged, missing and unexpected files; exit status 1 if there are any.
        recipe: Recipe of the training run whose sequence is traced.
        step: Training step to trace, counted from 0.
        row: Index of the sequence in the step's batch, counted from 0; 0 by default.
        tokenizer: New location of the store's tokenizer, if the tokenizer was moved.
    """
    from tinyllama.prepare.inspection import find_corruption, inspect_lines

    if verify and (recipe, step, row, tokenizer) != (None,) * 4:
        raise InputError("inspect: --verify checks the entire store; remove the other flags")
    if verify:
        found = find_corruption(store)
        echo("\n".join(found) or f"{store}: all files are present and unchanged")
        return 1 if found else 0
    for line in inspect_lines(store, recipe, step, row, tokenizer):
        echo(line)
    return 0


def plan(
    recipe: Recipe,
    hardware: str | None = None,
    gpus: int = 1,
    mfu: float | None = None,
    measure: bool = False,
    price: float | None = None,
    disk: float = 1e9,
    failure_hours: float = GPU_HOURS_BETWEEN_FAILURES,
    restart_minutes: float = 5.0,
    vocab_size: int | None = None,
    sweep: str | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Estimate a run's memory, speed, duration, cost, network traffic, disk space and failures.

    Args:
        hardware: a100-40g, a100-80g, h100, h100-pcie, h100-nvl, h200, h200-nvl, b200, l40s, 4090, 3090 or cpu; this
            machine by default.
        gpus: Number of GPUs.
        mfu: Assumed model FLOPs utilization, as a fraction of the peak FLOP/s; by default an estimate for the GPU.
        measure: Measure the speed of a few layers on this machine instead of assuming an MFU.
        price: Price of a GPU-hour, in any currency.
        disk: Speed at which all ranks together write a checkpoint, in bytes per second.
        failure_hours: Mean number of GPU-hours between failures; the default is that of Llama 3's training.
        restart_minutes: Time from a failure to the next step, in minutes.
        vocab_size: Vocabulary size to assume instead of the tokenizer's, for example if there is no tokenizer yet.
        sweep: Numbers of GPUs to compare, such as gpus=8,16,64,512.
        plot: PNG file for the plot of the sweep; by default plan-NAME.png, with the recipe's name.
        json: Print all numbers as JSON.
    """
    from tinyllama.plan.estimate import Assumptions
    from tinyllama.plan.show import show_plan

    assumptions = Assumptions(gpus, mfu, None, price, disk, failure_hours, restart_minutes)
    show_plan(recipe, hardware, assumptions, measure, sweep, plot, vocab_size, json)


def train(recipe: Recipe, allow_change: bool = False) -> None:
    """Train, or resume from the newest checkpoint.

    Args:
        allow_change: Resume even if the recipe and the checkpoint differ in fields that affect the weights.
    """
    from tinyllama.processes import die_with_torchrun, exit_on_signal

    die_with_torchrun()
    with exit_on_signal():
        from tinyllama.api import train_model

        run = train_model(recipe, allow_change=allow_change)
    if os.environ.get("RANK", "0") == "0":  # under torchrun, every rank runs this function
        echo(f"run: {run}")


def evaluate(
    model: Positional[str],
    tasks: tuple[str, ...] = ("hellaswag",),
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 64,
    precision: Literal["bf16", "fp16", "fp32"] = "bf16",
) -> None:
    """Evaluate a run, a checkpoint, a release or a Hugging Face model on lm-eval tasks, on all ranks under torchrun.

    Args:
        model: A run, a checkpoint, a release, or a Hugging Face folder or hub name.
        tasks: Names of lm-eval tasks.
        limit: Number of items to score per task, from the first item on; all items by default.
        num_fewshot: Number of few-shot examples before each item; by default the task's own number, usually 0.
        batch_size: Batch size of lm-eval's `hf`, which runs all models except those of the Llama 2 architecture.
        precision: Precision of the computation. fp16 replaces bf16 on GPUs without bf16; fp32 replaces fp16 on CPUs.
    """
    from tinyllama.api import evaluate_model
    from tinyllama.model.llama import PRECISIONS

    if said := evaluate_model(model, tasks, limit, PRECISIONS[precision], num_fewshot, batch_size):
        echo(said)  # empty on all ranks except rank 0


def release(
    source: Positional[str],
    step: int | None = None,
    formats: tuple[Literal["huggingface", "gguf", "ctranslate2"], ...] | None = None,
    average: int | None = None,
    average_decay: float | None = None,
    force: bool = False,
    push: str | None = None,
    public: bool = False,
) -> None:
    """Export a checkpoint, or a Hugging Face Llama, to a release folder with a model card and the model's lineage.

    Args:
        source: A run, a checkpoint, a release, or a Hugging Face Llama's folder or hub name.
        step: Step of the checkpoint; the newest by default.
        formats: Formats of the release, instead of the recipe's release.formats.
        average: Number of checkpoints to average, instead of the recipe's release.average_checkpoints.
        average_decay: Weight of each averaged checkpoint relative to the next newer one.
        force: Replace an existing release.
        push: Repository on the Hugging Face hub (OWNER/NAME) to upload the release to.
        public: Make the repository public if --push creates it; private by default.
    """
    from tinyllama.api import release_model

    for line in release_model(
        source,
        step,
        formats=formats,
        average=average,
        average_decay=average_decay,
        force=force,
        push=push,
        public=public,
    ):
        echo(line)


def verify(release: Positional[Path]) -> int:
    """Run a release's formats in their engines and compare the output with the checkpoint's; exit status 1 on failure.

    Args:
        release: Folder of the release.
    """
    from tinyllama.release.verify import format_checks, verify_release

    with translate_damage_errors(release):
        checks = verify_release(release)
    echo("\n".join(format_checks(checks)))
    return 0 if all(check.passed for check in checks) else 1


def generate(
    model: Positional[str],
    prompt: Positional[str],
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> None:
    """Complete a text.

    Args:
        model: A run, a checkpoint, a release, or a Hugging Face folder or hub name.
        prompt: Beginning of the text.
        max_new_tokens: Maximum number of generated tokens.
        temperature: Sampling temperature; 0 selects the most probable token.
        top_k: Number of most probable tokens to sample from; all tokens by default.
        seed: Random seed for sampling.
    """
    from tinyllama.api import generate_text

    for text in generate_text(model, prompt, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed):
        print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)  # noqa: T201
    echo()


def watch(runs: Positional[tuple[Path, ...]] = (), port: int | None = None, open_browser: bool = True) -> None:
    """Serve the report of a run as a live page on this machine, until interrupted.

    Args:
        runs: Folders of runs: the first is shown, compared with the others; by default the newest run in `runs`.
        port: Port of the page; a free one by default.
        open_browser: Open the page in a browser.
    """
    from tinyllama.report.live import watch as serve

    serve(runs, port, open_browser)


def report(run: Positional[Path], compare: tuple[Path, ...] = (), output: Path | None = None) -> None:
    """Write a run's curves, scores, recipe, data, events and releases to one HTML file that needs no network.

    Args:
        run: Folder of the run.
        compare: Other runs to plot for comparison.
        output: Output file; RUN/report.html by default.
    """
    from tinyllama.report.page import write_report

    echo(f"report: {write_report(run, compare, output)}")


def runs(folder: Positional[Path] = Path("runs")) -> None:
    """List the runs in a folder with their state, step, loss, speed, remaining time, last checkpoint and releases.

    Args:
        folder: Folder that contains the run folders.
    """
    from tinyllama.runs.listing import list_runs

    print("\n".join(list_runs(folder)))  # noqa: T201 - echo would escape the colours


def doctor(recipe: Recipe | None, json: bool = False) -> int:
    """Check this machine and, with a recipe, whether the recipe can run here; exit status 1 if a check fails.

    Args:
        json: Print the facts about the machine and the results of all checks as JSON.
    """
    from tinyllama.plan.doctor import show_doctor

    return show_doctor(recipe, json)


COMMANDS: dict[str, Callable[..., int | None]] = {
    "demo": demo,
    "corpus": corpus,
    "tokenizer train": tokenizer_train,
    "tokenizer import": tokenizer_import,
    "prepare": prepare,
    "inspect": inspect_store,
    "plan": plan,
    "train": train,
    "evaluate": evaluate,
    "release": release,
    "verify": verify,
    "generate": generate,
    "watch": watch,
    "report": report,
    "runs": runs,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: success. 1: a check failed, or a run could not continue. 2: wrong input. 75: training wrote a checkpoint and
    ended after a signal; a scheduler should requeue the job. 130: interrupted.
    """
    own, quiet = pop_quiet_flag(sys.argv[1:] if arguments is None else arguments)
    set_quiet(quiet)
    return run_and_get_exit_status(lambda: parse_command(own)() or 0)


def parse_command(arguments: list[str]) -> Callable[[], int | None]:
    """Return a function that runs a command line without `--quiet`. Raises InputError for wrong arguments."""
    is_help = not {*arguments[:1]} - {"-h", "--help", "help"}
    if is_help or (arguments[0] == "tokenizer" and not {*arguments[1:2]} - {"-h", "--help"}):
        return _print_commands
    words = 2 if arguments[0] == "tokenizer" else 1
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        raise InputError(f"{name}: no such command; known are {', '.join(COMMANDS)}")
    function, rest = COMMANDS[name], arguments[words:]
    if function.__annotations__.get("recipe") in (Recipe, Recipe | None):
        return parse_with_recipe(name, function, rest)
    return parse(name, function, rest)


def _print_commands() -> None:
    echo("usage: tinyllama COMMAND ... (tinyllama COMMAND --help shows its options)\n")
    for name, function in COMMANDS.items():
        echo(f"  {name:<17} {(function.__doc__ or '').splitlines()[0]}")
    echo("\n--quiet hides a command's progress, but not its warnings, errors and results.")
