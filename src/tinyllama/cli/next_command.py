"""The command that continues the work, which a command prints on standard error at its end."""

import shlex
from pathlib import Path

from tinyllama.formatting import echo
from tinyllama.progress import is_quiet
from tinyllama.runs.run_dir import RunDir


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
