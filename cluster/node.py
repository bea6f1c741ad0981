"""One torchrun, on this machine, that ends with the exit status of the run itself: `torchrun` in its arguments.

torchrun ends with 1 whatever its ranks end with, and starts a rank again also where that cannot help. Here the ranks
are `rank.py`, which ends torchrun with it and writes down its status: 75 to be started again later, 2 to be mended.
Where a scheduler starts again on another status than 75, ASK_AGAIN_STATUS says on which.
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
    """Run torchrun; 0, the status that a rank wrote down, 75 where a signal came before there was a rank, or 1."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "status"
        os.environ["RUN_STATUS"] = str(written)
        status = torchrun(arguments)
        status = int(written.read_text()) if written.exists() else status
    return int(os.environ.get("ASK_AGAIN_STATUS", status)) if status == 75 else status


def torchrun(arguments: list[str]) -> int:
    """What came of torchrun itself, which has said what it was."""
    try:
        run.main(arguments)
    except ChildFailedError:
        return 1
    except SignalException as ended:
        return 75 if ended.sigval in ASKED_TO_SAVE else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
