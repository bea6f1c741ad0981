"""One rank: `python -m tinyllama`, which for status 75 or 2 also ends the torchrun that would restart it."""

import os
import signal
import sys
from pathlib import Path

from tinyllama.cli import main

FINAL = (75, 2)
"""Statuses after which a restart by torchrun cannot help: saved after a signal, and wrong input."""


def leave(status: int) -> None:
    """Record the status for `node.py`, unless another rank of this machine did, and end torchrun."""
    try:
        with Path(os.environ["RUN_STATUS"]).open("x") as file:
            file.write(str(status))
    except FileExistsError:
        return
    os.kill(os.getppid(), signal.SIGTERM)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    if status in FINAL:
        leave(status)
    sys.exit(status)
