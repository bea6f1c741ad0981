"""Command line: the table of commands, and the exit status.

The modules of this package have one short function per command; the functions call other packages. A command that takes
a recipe also accepts each field of the recipe as a flag: `tinyllama train demo --train.tokens 5M`. Wrong input causes
exit status 2 and one line on standard error.
"""

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from tinyllama.cli import data, model, results, training
from tinyllama.cli.arguments import Command, parse, pop_quiet_flag
from tinyllama.cli.next_command import AFTER_INTERRUPTION
from tinyllama.errors import InputError, run_and_get_exit_status
from tinyllama.formatting import echo
from tinyllama.progress import set_quiet

# Help and completion are imported when they are needed, because they are not needed to run a command.
# ruff: noqa: PLC0415


def completion(shell: Positional[Annotated[Literal["bash", "zsh", "fish"], arg(metavar="SHELL")]]) -> None:
    """Print the completion script of a shell.

    Examples:
        source <(tinyllama completion bash)
        tinyllama completion fish > ~/.config/fish/completions/tinyllama.fish

    Args:
        shell: The shell: bash, zsh or fish.
    """
    from tinyllama.cli.completion import completion_script

    echo(completion_script(shell, COMMANDS))


GROUPS: dict[str, dict[str, Command]] = {
    "start": {"demo": training.demo, "init": training.init, "run": training.run, "doctor": training.doctor},
    "data": {
        "corpus": data.corpus,
        "tokenizer train": data.tokenizer_train,
        "tokenizer import": data.tokenizer_import,
        "prepare": data.prepare,
        "inspect": data.inspect,
    },
    "training": {"plan": training.plan, "train": training.train},
    "results": {
        "runs": results.runs,
        "watch": results.watch,
        "report": results.report,
        "evaluate": results.evaluate,
    },
    "model": {"release": model.release, "verify": model.verify, "generate": model.generate},
    "shell": {"completion": completion},
}
"""The commands by group, in the order of `tinyllama --help`."""
COMMANDS: dict[str, Command] = {name: function for group in GROUPS.values() for name, function in group.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: success. 1: a check failed, or a run could not continue. 2: wrong input. 75: training wrote a checkpoint and
    ended after a signal; a scheduler should requeue the job. 130: Ctrl-C; training wrote a checkpoint, unless it was
    aborted.
    """
    own, quiet = pop_quiet_flag(sys.argv[1:] if arguments is None else arguments)
    set_quiet(quiet)
    return run_and_get_exit_status(lambda: _run(own))


def _run(arguments: list[str]) -> int:
    """Run a command line without `--quiet`, and return its exit status; add the remedy to a KeyboardInterrupt."""
    try:
        return parse_command(arguments)() or 0
    except KeyboardInterrupt as error:
        if not error.args and (remedy := AFTER_INTERRUPTION.get(_command_name(arguments))):
            error.args = (f"interrupted; {remedy}",)
        raise


def _command_name(arguments: list[str]) -> str:
    return " ".join(arguments[: 2 if arguments[:1] == ["tokenizer"] else 1])


def parse_command(arguments: list[str]) -> Callable[[], int | None]:
    """Return a function that runs a command line without `--quiet`. Raises InputError for wrong arguments."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    first = arguments[0] if arguments else "--help"
    if first in ("--version", "version"):
        return lambda: echo(f"tinyllama {version('tinyllama')}")
    if first in ("-h", "--help", "--help-all") or (first == "tokenizer" and not {*arguments[1:2]} - {"-h", "--help"}):
        return _print_overview
    name = _command_name(arguments)
    if name not in COMMANDS:
        known = [*COMMANDS, "version", "help"]
        close = difflib.get_close_matches(name, known, n=1) or [other for other in known if other.startswith(name)]
        raise InputError(
            f"{name}: no such command; " + (f"did you mean {close[0]}?" if close else "see tinyllama --help")
        )
    return parse(name, COMMANDS[name], arguments[len(name.split()) :])


def _print_overview() -> None:
    from tinyllama.cli.help import overview

    echo("\n".join(overview(GROUPS)))
