"""The program with other timeouts for trackers: CALL_TIMEOUT SHUTDOWN_TIMEOUT ARGUMENTS..."""

import sys

from tinyllama.cli import main
from tinyllama.tracking import trackers

if __name__ == "__main__":
    trackers.CALL_TIMEOUT_SECONDS, trackers.SHUTDOWN_TIMEOUT_SECONDS = float(sys.argv.pop(1)), float(sys.argv.pop(1))
    sys.exit(main())
