"""What a process asks of the kernel about its life, and what it gives those that it starts."""

import atexit
import ctypes
import getpass
import os
import shutil
import signal
import stat
import tempfile
from pathlib import Path


def available_cpu_count() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def set_parent_death_signal(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, so that no orphan works during the next run.

    Where the parent's number is given and it has ended already, so does this process.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def die_with_torchrun() -> None:
    """Have a rank of a torchrun end with it: ranks have sessions of their own, and would outlive it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal()


def sidecar_environment(one_core: bool) -> dict[str, str]:
    """A process's that works beside training: no rank of a torchrun, no GPU; one core, or as many as there are."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS")  # torchrun sets one thread
    own = {"CUDA_VISIBLE_DEVICES": "", **({"OMP_NUM_THREADS": "1"} if one_core else {})}
    return {name: value for name, value in os.environ.items() if name not in ranks} | own


def _has_own_folder_of_headers() -> bool:
    """Return whether this user alone can write to torch's precompiled headers, which lie in the shared folder."""
    try:
        folder = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return False
        folder.chmod(0o700)
    except (OSError, KeyError):  # KeyError: the user ID has no name
        return False
    return True


def use_private_compile_cache() -> None:
    """Have torch.compile keep its code in this user's cache folder, not in the folder that all users write to.

    torch executes what it finds in its cache, by default `/tmp/torchinductor_USER`, which any user can create first. It
    reads the variable while it imports `torch._inductor`, so call this before. Without a writable cache folder of the
    user, the cache is a new temporary folder of this process.
    """
    if not _has_own_folder_of_headers():
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
