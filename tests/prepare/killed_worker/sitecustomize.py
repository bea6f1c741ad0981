"""Every Python with this folder on its path is killed when it has written half of one shard.

KILLED_SHARD is the shard's number. With KILLED_ONCE, a file that marks the first kill, there is only one. With
KILLED_WITH, only a process that has this environment variable is killed.
"""

import os
import signal
from pathlib import Path


def is_wanted(path: str) -> bool:
    """Return whether a file is half of the shard, and its process is to be killed."""
    if f"modules/train/{os.environ['KILLED_SHARD']}.tokens" not in path:
        return False
    if os.environ.get("KILLED_WITH", "PATH") not in os.environ:
        return False
    marker = os.environ.get("KILLED_ONCE")
    if marker and Path(marker).exists():
        return False
    if marker:
        Path(marker).touch()
    return True


def fsync_or_die(fd: int, fsync=os.fsync) -> None:  # type: ignore[no-untyped-def]
    """Replace os.fsync, which every shard is written with."""
    path = str(Path(f"/proc/self/fd/{fd}").readlink())
    if is_wanted(path):
        os.truncate(path, Path(path).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(fd)


if "KILLED_SHARD" in os.environ:
    os.fsync = fsync_or_die  # type: ignore[assignment]
