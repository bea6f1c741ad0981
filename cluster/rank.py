"""Wrapper around `python -m tinyllama` for one rank: for status 75 or 2, it also ends torchrun.

Otherwise torchrun would restart the rank.
"""

import os
import signal
import sys
from pathlib import Path

from tinyllama.cli import main

FINAL = (75, 2)
"""Exit statuses after which torchrun must not restart the rank: 75 (saved after a signal) and 2 (wrong input)."""


def leave(status: int) -> None:
    """Record the status for `node.py` and end torchrun, unless another rank of this node has done both."""
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
