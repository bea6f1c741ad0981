"""Child processes: the signal at their parent's death, their environment, and torch's compile cache."""

import atexit
import ctypes
import getpass
import os
import shutil
import signal
import stat
import tempfile
from pathlib import Path


def set_parent_death_signal(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, so that no orphan works during the next run.

    If the process ID `parent` is given and that process has ended already, this process ends at once.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def die_with_torchrun() -> None:
    """Make a rank end when its torchrun ends: ranks have their own sessions and would outlive it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal()


def sidecar_environment(one_core: bool) -> dict[str, str]:
    """Return the environment of a process next to training: not a rank, no GPU; one core, or all cores."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS")  # torchrun sets one thread
    own = {"CUDA_VISIBLE_DEVICES": "", **({"OMP_NUM_THREADS": "1"} if one_core else {})}
    return {name: value for name, value in os.environ.items() if name not in ranks} | own


def use_private_compile_cache() -> None:
    """Make torch.compile keep its code in this user's cache folder, not in the folder that all users can write.

    torch executes what it finds in its cache, by default `/tmp/torchinductor_USER`, which any user can create first. It
    reads the variable while it imports `torch._inductor`, so call this before. Without a writable cache folder of the
    user, the cache is a new temporary folder of this process.
    """
    if not _owns_shared_header_folder():
        os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        folder = base / "tinyllama" / "torchinductor"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        folder = Path(tempfile.mkdtemp(prefix="tinyllama-torchinductor-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _owns_shared_header_folder() -> bool:
    """Return whether only this user can write torch's precompiled headers, which are in a folder under /tmp."""
    try:
        folder = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return False
        folder.chmod(0o700)
    except (OSError, KeyError):  # KeyError: the user ID has no name
        return False
    return True
