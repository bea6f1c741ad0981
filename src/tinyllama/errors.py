"""What ends a command: the command line prints the message as one line and exits with the status. And warnings."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tinyllama.terminal import echo


class InputError(ValueError):
    """Wrong input, which the user can mend: the place, the value and the remedy, in one line. Exit status 2."""


class RunStoppedError(RuntimeError):
    """A run that ended before its last step: why, and what to do, in one line; and the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


DAMAGE = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError)
"""Exceptions that code raises on a damaged or hostile file."""


@contextmanager
def damage_named(place: Path) -> Iterator[None]:
    """Turn what the block raises on a damaged or hostile file below `place` into an InputError."""
    try:
        yield
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(
            f"{place}: a file there is invalid ({summarize_error(error)}); restore it, or report this"
        ) from error


def first_line(error: BaseException) -> str:
    """An error's first line, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def summarize_error(error: BaseException) -> str:
    """An error's first line; with its kind, where it was not written for people."""
    words = first_line(error)
    return words if isinstance(error, InputError) else f"{type(error).__name__}: {words}"


@cache
def warn_once(line: str) -> None:
    """Print a line on standard error, once per process and only by one of a machine's ranks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        echo(line, to_stderr=True)
