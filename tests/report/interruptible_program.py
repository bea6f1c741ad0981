"""The program, interruptible by Ctrl-C: processes that a shell starts in the background ignore it."""

import signal
import sys

from tinyllama.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
