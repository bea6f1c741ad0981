"""How a command ends: its exit status, and one line on standard error for each way that is no success."""

import os
import sys
from collections.abc import Callable

from tinyllama.errors import InputError, RunStoppedError
from tinyllama.terminal import echo

INPUT_STATUS = 2
"""Of wrong input: trying again changes nothing."""
INTERRUPTED = "interrupted; prepare, train and demo resume when they are run again"


def run_to_status(call: Callable[[], int | None], system_status: int = INPUT_STATUS) -> int:
    """Call something, with one line on standard error and an exit status for each way that it may end.

    `system_status` is the status where the system refuses something, such as to write to a full disk.
    """
    try:
        return call() or 0
    except InputError as error:
        _say(error)
        return INPUT_STATUS
    except RunStoppedError as stop:
        _say(stop)
        return stop.status
    except BrokenPipeError:  # who read the output has read enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        _echo_line(f"{error.filename}: {error.strerror}; make it possible and run this again")
        return system_status
    except KeyboardInterrupt:
        _echo_line(INTERRUPTED)
        return 130


def _say(error: Exception) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # a machine's ranks find the same, another machine perhaps not
        _echo_line(str(error))


def _echo_line(message: str) -> None:
    echo("tinyllama: " + message.replace("\n", "\\n"), to_stderr=True)
