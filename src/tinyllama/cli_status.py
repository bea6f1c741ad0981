"""How a command ends: its exit status, and one line on standard error for each way that is no success."""

import errno
import os
import sys
from collections.abc import Callable

from tinyllama.errors import InputError, RunStoppedError, first_line
from tinyllama.terminal import echo

INPUT_STATUS = 2
"""Of wrong input: trying again changes nothing."""


def run_and_get_exit_status(call: Callable[[], int | None], system_status: int = INPUT_STATUS) -> int:
    """Call something, with one line on standard error and an exit status for each way that it may end.

    `system_status` is the status where the system refuses something, such as to write to a full disk.
    """
    try:
        return call() or 0
    except BrokenPipeError:  # who read the output has read enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        ending = _ending(error, system_status)
        if ending is None:
            raise
        message, status = ending
        # A machine's ranks find the same mistakes, another machine perhaps others.
        if not isinstance(error, InputError | RunStoppedError) or os.environ.get("LOCAL_RANK", "0") == "0":
            echo("tinyllama: " + message.replace("\n", "\\n"), to_stderr=True)
        return status


def _ending(error: BaseException, system_status: int) -> tuple[str, int] | None:
    """Return the message and the exit status for an error; None for a fault of this program."""
    match error:
        case InputError():
            return str(error), INPUT_STATUS
        case RunStoppedError():
            return str(error), error.status
        case KeyboardInterrupt():
            return "interrupted; prepare, train and demo resume when they are run again", 130
        case OSError(errno=errno.EAGAIN) | RuntimeError(args=("can't start new thread",)):
            remedy = "raise their limit (ulimit -u)"
            return f"the system starts no more threads or processes ({first_line(error)}); {remedy}", system_status
        case OSError() if error.filename is not None:
            return f"{error.filename}: {error.strerror}; make it possible and run this again", system_status
    return None
