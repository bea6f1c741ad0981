"""Child processes: the signal when their parent ends, their environment, and torch's compile cache."""

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
    """Make the kernel kill this process when its parent ends, so that no orphan is active during the next run.

    If the process with the ID `parent` has already ended, this process ends immediately.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def die_with_torchrun() -> None:
    """Make a rank end when torchrun ends; the rank would otherwise continue, because it has its own session."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal()


def sidecar_environment(one_core: bool) -> dict[str, str]:
    """Return the environment of a sidecar process, which is not a rank and uses no GPU.

    `one_core` limits the process to one thread.
    """
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS")  # torchrun sets one thread
    own = {"CUDA_VISIBLE_DEVICES": "", **({"OMP_NUM_THREADS": "1"} if one_core else {})}
    return {name: value for name, value in os.environ.items() if name not in ranks} | own


def use_private_compile_cache() -> None:
    """Make torch.compile keep its code in this user's cache folder, not in the folder that all users can write.

    torch executes the code in its cache, by default `/tmp/torchinductor_USER`, and another user can create that folder
    first. Call this function before torch imports `torch._inductor`, which reads the environment variable. If the
    user's cache folder is not writable, the cache is a new temporary folder of this process.
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
    """Make the folder of torch's precompiled headers under /tmp private; return whether this user owns the folder."""
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
