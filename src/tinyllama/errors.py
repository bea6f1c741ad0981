"""Errors, their exit statuses, and warnings.

The command line prints an error's message as one line on standard error.
"""

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tinyllama.formatting import echo

INPUT_ERROR_STATUS = 2
"""Exit status for wrong input; a scheduler should not run the command again."""
REQUEUE_STATUS = 75
"""Exit status after SIGTERM or SIGUSR1, for requeueing: EX_TEMPFAIL ("try again later") of sysexits.h."""
INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C: 128 plus the number of SIGINT, as in a shell."""
DAMAGE_ERRORS = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
"""Exceptions that parsing a damaged or hostile file can cause."""


class InputError(ValueError):
    """Wrong input that the user can correct; the message is `place: problem; remedy` in one line. Exit status 2."""


class UnsupportedModelError(InputError):
    """A model with an architecture that `model.llama` does not have; transformers may run it."""


class RunStoppedError(RuntimeError):
    """A run that stopped before its last step; the message has the reason and the remedy in one line.

    `signal` is the signal that stopped the run, if any. The exit status is then REQUEUE_STATUS, and otherwise 1.
    """

    def __init__(self, message: str, signal: str = "") -> None:
        super().__init__(message)
        self.signal = signal
        self.status = REQUEUE_STATUS if signal else 1


class SavedInterrupt(KeyboardInterrupt):
    """Ctrl-C during training, after a checkpoint was saved; the message has the remedy in one line."""


class CommandAbort(KeyboardInterrupt):
    """Ctrl-C in a command, whose process then ends without waiting for its threads and sidecars."""


class CommandStopped(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 in a command; not a subclass of Exception, which handlers of errors would catch."""

    def __init__(self, signal: str) -> None:
        super().__init__(f"{signal}: stopped; rerun the same command to resume")
        self.signal, self.status = signal, REQUEUE_STATUS


def run_and_get_exit_status(call: Callable[[], int | None], system_status: int = INPUT_ERROR_STATUS) -> int:
    """Call a function and return an exit status; print one line on standard error if the call fails.

    `system_status` is the status for errors of the operating system, such as a full disk. Errors that indicate a bug in
    this program are re-raised.
    """
    try:
        return call() or 0
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, status = _message_and_status(error, system_status)
        message = "; ".join([message, *getattr(error, "__notes__", ())])
        # All ranks of a machine usually raise the same error of these classes, so only one rank prints it. Other errors
        # may differ by rank.
        is_common = isinstance(error, InputError | RunStoppedError | ModuleNotFoundError | KeyboardInterrupt)
        if not is_common or os.environ.get("LOCAL_RANK", "0") == "0":
            echo("tinyllama: " + message.replace("\n", "\\n"), to_stderr=True)
        return status


def _message_and_status(error: BaseException, system_status: int) -> tuple[str, int]:
    match error:
        case InputError():
            return str(error), INPUT_ERROR_STATUS
        case RunStoppedError() | CommandStopped():
            return str(error), error.status
        case KeyboardInterrupt():
            return str(error) or "interrupted", INTERRUPTED_STATUS
        case OSError(errno=errno.EAGAIN) | RuntimeError(args=("can't start new thread",)):
            problem = f"the system cannot start more threads or processes ({first_line(error)})"
            return f"{problem}; raise the limit (ulimit -u)", system_status
        case ModuleNotFoundError(name=str(name)) if not name.startswith("tinyllama"):
            package = name.partition(".")[0]
            return f"{package}: not installed; pip install {package}", INPUT_ERROR_STATUS
        case OSError() if error.filename is not None:
            return f"{error.filename}: {error.strerror}; correct this and run the command again", system_status
        case _:
            raise error


@contextmanager
def translate_damage_errors(place: Path) -> Iterator[None]:
    """Convert errors that a damaged or hostile file below `place` causes in the block into InputError."""
    try:
        yield
    except InputError:
        raise
    except DAMAGE_ERRORS as error:
        raise InputError(
            f"{place}: a file there is invalid ({summarize_error(error)}); restore it, or report this as a bug"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def summarize_error(error: BaseException) -> str:
    """Return the first line of an error's message; for any error except an InputError, put the error's class first."""
    return first_line(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"


@cache
def warn_once(line: str) -> None:
    """Print a line on standard error, once per process and only in one rank per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        echo(line, to_stderr=True)


def silence_torchao() -> None:
    """Suppress the log messages that importing torchao causes.

    Call this function before torchao is imported, and before transformers, which imports torchao. On import, torchao
    logs a message for each extension that does not match the GPU or the Python version. torch logs a warning about
    torchao's enums.
    """
    extension, enum = "Failed to load ", "is an Enum subclass and is now natively supported"
    logging.getLogger("torchao").addFilter(lambda record: not record.getMessage().startswith(extension))
    logging.getLogger("torch.utils._pytree").addFilter(lambda record: enum not in record.getMessage())
