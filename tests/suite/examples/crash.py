"""A test process that crashes, as a library's native code does."""

import os
import signal


def test_that_crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)
