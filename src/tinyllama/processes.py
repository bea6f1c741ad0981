"""What a process asks of the kernel about its life."""

import ctypes
import platform
import signal


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, so that no orphan works on beside the next run (Linux)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
