"""Wrapper around torchrun on one node, with the same arguments, that ends with the exit status of the run.

torchrun alone ends with status 1 for any failure, and restarts ranks that ended on purpose. The ranks run `rank.py`,
which records status 75 (saved after a signal) or 2 (wrong input) and ends torchrun. If a scheduler restarts a run for
another status than 75, set the environment variable ASK_AGAIN_STATUS to this status.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

ASKED_TO_SAVE = (signal.SIGTERM, signal.SIGUSR1)


def main(arguments: list[str]) -> int:
    """Run torchrun and return the status that a rank recorded, or otherwise torchrun's status."""
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder) / "status"
        os.environ["RUN_STATUS"] = str(status_file)
        status = torchrun(arguments)
        status = int(status_file.read_text()) if status_file.exists() else status
    return int(os.environ.get("ASK_AGAIN_STATUS", status)) if status == 75 else status


def torchrun(arguments: list[str]) -> int:
    """Run torchrun and return 0 after success, 75 after a signal to save, and 1 after a failure."""
    try:
        run.main(arguments)
    except ChildFailedError:
        return 1
    except SignalException as ended:
        return 75 if ended.sigval in ASKED_TO_SAVE else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
