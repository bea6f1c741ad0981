"""What a process asks of the kernel about its life."""

import ctypes
import os
import platform
import signal


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel (Linux's) kill this process when its parent ends: no orphan works on beside the next run.

    Where the parent's number is given and it has ended already, so does this process.
    """
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def end_with_torchrun() -> None:
    """Have a rank of a torchrun end with it: ranks have sessions of their own, and would outlive it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
