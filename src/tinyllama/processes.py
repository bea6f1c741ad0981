"""What a process asks of the kernel about its life."""

import ctypes
import platform
import signal


def end_with_parent() -> None:
    """Have the kernel (Linux's) kill this process when its parent ends: no orphan works on beside the next run."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
