"""How a command ends: its exit status, and one line on standard error for each way that is no success."""

import os
import sys
from collections.abc import Callable

from tinyllama.errors import InputError, RunStoppedError

INPUT_STATUS = 2
"""Of wrong input: trying again changes nothing."""


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
        print(f"tinyllama: {error.filename}: {error.strerror}; make it possible and run this again", file=sys.stderr)
        return system_status
    except KeyboardInterrupt:
        print("tinyllama: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _say(error: Exception) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # a machine's ranks find the same, another machine perhaps not
        print(f"tinyllama: {error}", file=sys.stderr)
