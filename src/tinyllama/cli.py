"""The command line: one short function per command, no logic.

A command that takes a recipe takes any of its fields as a flag too: `tinyllama train demo --train.tokens 5M`. Wrong
input ends with exit status 2 and one line on standard error.
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
from tinyllama.plan.speed import GPU_HOURS_BETWEEN_FAILURES
from tinyllama.progress import set_quiet
from tinyllama.recipe import Recipe

# Each command imports what it needs when it runs: `tinyllama --help` should not wait for torch.
# ruff: noqa: PLC0415


def demo(recipe: Recipe) -> int:
    """Take the embedded corpus to a released model: corpus, tokenizer, prepare, train, release, verify, evaluate."""
    from tinyllama.train.signals import exit_on_signal

    with exit_on_signal():
        from tinyllama.demo import run_demo

        return run_demo(recipe)


def corpus(directory: Positional[Path]) -> None:
    """Write the embedded corpus: real text of this Python and its packages, in SlimPajama's and Starcoderdata's form.

    Args:
        directory: Folder that gets `slimpajama/` and `starcoderdata/`.
    """
    from tinyllama.prepare.corpus import write_corpus

    report = write_corpus(directory)
    for folder, parts in report.by_folder().items():
        for name, size in parts.items():
            echo(f"{directory / folder}: {name}: {size.documents:,} documents, {size.bytes:,} bytes")
    for reason, count in report.left_out.items():
        echo(f"skipped: {count:,} {reason}")


def tokenizer_train(recipe: Recipe, vocab_size: int = 8192, sample_bytes: int = 16_000_000) -> None:
    """Train a Llama-style BPE on the recipe's sources and write it where the recipe's `tokenizer` says.

    Args:
        vocab_size: Pieces, the 3 markers and the 256 bytes included.
        sample_bytes: Text to train on, taken from the sources by their weights.
    """
    from tinyllama.prepare.selection import train_recipe_tokenizer

    folder, text = train_recipe_tokenizer(recipe, vocab_size, sample_bytes)
    echo(f"tokenizer: {folder}\n    {text}")


def tokenizer_import(source: Positional[str], directory: Positional[Path]) -> None:
    """Convert a tokenizer.model to a tokenizer folder, proved equal to SentencePiece.

    Args:
        source: A tokenizer.model, or a folder or hub name that has one.
        directory: Folder to write.
    """
    from tinyllama.tokenizer.training import convert_tokenizer

    convert_tokenizer(source, directory)
    echo(f"tokenizer: {directory}")


def prepare(recipe: Recipe, strict: bool = False) -> None:
    """Tokenise every source into the token store; resume an interrupted run.

    Args:
        strict: Make no store where a file gives no document, or where most of its rows are rejected; exit status 2.
    """
    from tinyllama.prepare.inspection import prepared_lines
    from tinyllama.prepare.pipeline import prepare_store

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
    """Say what a token store holds: counts, mix, what was left out, samples; or check it; or trace a training row.

    Args:
        store: The store's folder.
        verify: Read every byte and name each file that is damaged, cut, missing or foreign; exit status 1 if any is.
        recipe: A recipe, to trace one of its rows.
        step: Training step to trace, counted from 0.
        row: Row of that step's batch to trace, counted from 0; the first without it.
        tokenizer: The store's tokenizer, where it is no longer where it was.
    """
    from tinyllama.data.verification import find_corruption
    from tinyllama.prepare.inspection import inspect_lines

    if verify and (recipe, step, row, tokenizer) != (None,) * 4:
        raise InputError("inspect: --verify checks the whole store; leave the other flags out")
    if verify:
        found = find_corruption(store)
        echo("\n".join(found) or f"{store}: every file is there, and every byte is what it was")
        return 1 if found else 0
    for line in inspect_lines(store, recipe, step, row, tokenizer):
        echo(line)
    return 0


def plan(
    recipe: Recipe,
    hardware: str | None = None,
    gpus: int = 1,
    mfu: float = 0.5,
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
    """Say what a run will need: parameters, memory, tokens/s, days, money, traffic, disk, failures.

    Args:
        hardware: a100-40g, a100-80g, h100, h200, b200, l40s, 4090, 3090 or cpu; without it, this machine's.
        gpus: How many of them.
        mfu: Share of the peak that training reaches.
        measure: Instead of an MFU, time a few of the recipe's layers on this machine.
        price: Of a GPU-hour, in any currency.
        disk: Bytes a second at which all ranks together write a checkpoint.
        failure_hours: GPU-hours between two failures (Llama 3's run: one in 50,676).
        restart_minutes: From a failure to the next step.
        vocab_size: Pieces, where the tokenizer is not here yet.
        sweep: Numbers of GPUs to compare and draw, such as gpus=8,16,64,512.
        plot: PNG file for the sweep; plan-NAME.png without it.
        json: Print every figure as JSON.
    """
    from tinyllama.plan.estimate import Assumptions
    from tinyllama.plan.show import show_plan

    assumptions = Assumptions(gpus, mfu, None, price, disk, failure_hours, restart_minutes)
    show_plan(recipe, hardware, assumptions, measure, sweep, plot, vocab_size, json)


def train(recipe: Recipe, allow_change: bool = False) -> None:
    """Train, going on where the run stands if it has begun.

    Args:
        allow_change: Go on although the recipe differs from the checkpoint's in what changes the weights.
    """
    from tinyllama.preflight import check_training
    from tinyllama.processes import die_with_torchrun
    from tinyllama.train.signals import exit_on_signal

    die_with_torchrun()
    is_main = os.environ.get("RANK", "0") == "0"  # under torchrun every rank comes here
    with exit_on_signal():
        from tinyllama.train.loop import train as train_run

        warnings = check_training(recipe, int(os.environ.get("WORLD_SIZE", "1")))
        for warning in warnings if is_main else ():
            echo(warning, to_stderr=True)
        run = train_run(recipe, allow_change=allow_change)
    if is_main:
        echo(f"run: {run}")


def evaluate(
    model: Positional[str],
    tasks: tuple[str, ...] = ("hellaswag",),
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 64,
    precision: Literal["bf16", "fp32"] = "bf16",
) -> None:
    """Score a run, a checkpoint, a release or a Hugging Face model on lm-eval tasks; under torchrun on all its ranks.

    Args:
        model: A run, a checkpoint, a release, or a Hugging Face folder or hub name.
        tasks: Names of lm-eval tasks.
        limit: Items a task at most, the first of it; all without it.
        num_fewshot: Solved examples before each item; a task's own number without it, for most tasks 0.
        batch_size: Requests that lm-eval's `hf` computes together, which scores what is no Llama 2.
        precision: Of the computation.
    """
    from tinyllama.model.llama import PRECISIONS
    from tinyllama.release.command import evaluate_model

    if said := evaluate_model(model, tasks, limit, PRECISIONS[precision], num_fewshot, batch_size):
        echo(said)  # under torchrun the first rank's


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
    """Turn a checkpoint, or any Hugging Face Llama, into a folder that others can use, with its card and lineage.

    Args:
        source: A run's folder, a checkpoint's, a Hugging Face Llama's folder or hub name, a release.
        step: The checkpoint's step; the newest without it.
        formats: What the release holds, instead of the recipe's release.formats.
        average: Checkpoints to average, instead of the recipe's release.average_checkpoints.
        average_decay: Weight of each of them, times that of the one after it.
        force: Replace a release that is there already.
        push: Upload the release to this repository of the Hugging Face hub, OWNER/NAME.
        public: Where --push makes the repository, make it public; without it, it is private.
    """
    from tinyllama.release.command import release_model

    for line in release_model(source, step, formats, average, average_decay, force, push, public):
        echo(line)


def verify(release: Positional[Path]) -> int:
    """Run each format of a release in its own engine and hold it against the checkpoint; exit status 1 on a fail.

    Args:
        release: The release's folder.
    """
    from tinyllama.release.verify import table
    from tinyllama.release.verify import verify as verify_release

    with translate_damage_errors(release):
        checks = verify_release(release)
    echo("\n".join(table(checks)))
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
        prompt: The text to go on from.
        max_new_tokens: Tokens to add at most.
        temperature: 0 takes the likeliest token; above it draws.
        top_k: Draw from this many likeliest tokens only.
        seed: Of the draws.
    """
    from tinyllama.api import generate_text

    for text in generate_text(model, prompt, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed):
        print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)  # noqa: T201
    echo()


def watch(
    run: Positional[Path],
    port: int | None = None,
    open_browser: bool = True,
    publish: str | None = None,
    public: bool = False,
) -> None:
    """Open the live page of a run and those beside it, on this machine only, until interrupted.

    Args:
        run: The run's folder.
        port: Port of the page; a free one without it.
        open_browser: Open it in a browser.
        publish: Put the page on this Space of the Hugging Face hub, OWNER/NAME, instead of opening it here.
        public: Where --publish makes the Space, make it public; without it, it is private.
    """
    from tinyllama.tracking.watch import publish_page as publish_run
    from tinyllama.tracking.watch import watch as watch_run

    if publish:
        echo(f"published: {publish_run(run, publish, public)}")
    else:
        watch_run(run, port, open_browser)


def report(run: Positional[Path], compare: tuple[Path, ...] = (), output: Path | None = None) -> None:
    """Write one HTML file that shows a run whole: curves, scores, recipe, data, events, releases; it needs no network.

    Args:
        run: The run's folder.
        compare: Other runs, to draw beside it.
        output: The file to write; RUN/report.html without it.
    """
    from tinyllama.report import write_report

    echo(f"report: {write_report(run, compare, output)}")


def runs(folder: Positional[Path] = Path("runs")) -> None:
    """List the runs under a folder: state, step, loss, speed, time left, last checkpoint, releases.

    Args:
        folder: The folder that holds the runs' folders.
    """
    from tinyllama.runs.listing import list_runs

    print("\n".join(list_runs(folder)))  # noqa: T201 - its cells are visible, its colours are not text


def doctor(recipe: Recipe | None, json: bool = False) -> int:
    """Say what this machine has and, given a recipe, what would be missing for it; exit status 1 if anything is.

    Args:
        json: Print what was found, and every row, as JSON.
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
    """Run the command line; return its exit status.

    0; 1 for damage found, or a run that could not go on; 2 for wrong input; 75 where a signal had it save and end, so
    that a scheduler starts it again; 130 where interrupted.
    """
    given, quiet = pop_quiet_flag(sys.argv[1:] if arguments is None else arguments)
    set_quiet(quiet)

    def call() -> int | None:
        return _command(given)()

    return run_and_get_exit_status(call)


def _command(arguments: list[str]) -> Callable[[], int | None]:
    """The call that a command line asks for."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _print_commands
    if arguments[0] == "tokenizer" and not {*arguments[1:2]} - {"-h", "--help"}:
        return _print_commands
    words = 2 if arguments[0] == "tokenizer" else 1
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        raise InputError(f"{name}: no such command; there are {', '.join(COMMANDS)}")
    function, rest = COMMANDS[name], arguments[words:]
    if function.__annotations__.get("recipe") in (Recipe, Recipe | None):
        return parse_with_recipe(name, function, rest)
    return parse(name, function, rest)


def _print_commands() -> None:
    echo("usage: tinyllama COMMAND ... (tinyllama COMMAND --help says more)\n")
    for name, function in COMMANDS.items():
        echo(f"  {name:<17} {(function.__doc__ or '').splitlines()[0]}")
    echo("\nWith --quiet a command shows no progress; warnings, errors and results stay.")
