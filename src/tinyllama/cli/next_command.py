"""The last line of a command on standard error: the command that continues the work, or the remedy after Ctrl-C."""

import shlex
from pathlib import Path

from tinyllama.formatting import echo
from tinyllama.progress import is_quiet
from tinyllama.runs.run_dir import RunDir

_CONTINUES = "rerun the same command to continue with the unfinished stage"
_STARTS_AGAIN = "nothing was saved; rerun the same command"
AFTER_INTERRUPTION = {
    "demo": _CONTINUES,
    "run": _CONTINUES,
    "tokenizer train": _STARTS_AGAIN,
    "prepare": "rerun the same command to continue with the unfinished files",
    "train": "rerun the same command to resume",
    "evaluate": _STARTS_AGAIN,
    "release": "rerun the same command to make the unfinished release again",
}
"""Remedy after Ctrl-C, by command; the other commands have no progress to lose."""


def echo_next(command: str) -> None:
    """Print the command that continues the work, ready to paste, unless `--quiet` was given."""
    if not is_quiet():
        echo(f"next: {command}", to_stderr=True)


def after_training(run: Path) -> str:
    """Return the command that releases a run's newest checkpoint, or verifies its release if there is one."""
    checkpoint = RunDir(run).find_checkpoint()
    release = RunDir(run).releases.release(checkpoint.name)
    if checkpoint.is_released_as(release):
        return shlex.join(["tinyllama", "verify", str(release.path)])
    return shlex.join(["tinyllama", "release", str(run)])


def after_evaluation(model: str, scores: Path) -> str:
    """Return the command that reports the run to which a file of scores belongs, or that completes a text."""
    run = next((folder for folder in scores.parents if RunDir(folder).is_started), None)
    return shlex.join(["tinyllama", "report", str(run)]) if run else completion_command(model)


def completion_command(model: str | Path) -> str:
    """Return a command that completes a text with a model."""
    return shlex.join(["tinyllama", "generate", str(model), "Once upon a time"])
