"""Files that are either whole or not there: written beside their name, flushed to disk, then renamed."""

import errno
import fcntl
import glob
import hashlib
import os
import platform
import re
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from tinyllama.errors import InputError

_DISK_FULL_THRESHOLD_BYTES = 1 << 20
"""Free bytes below which a disk is taken for full."""


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that takes the name `path` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_temp_files(path)
    part = path.with_name(f"{path.name}.{_host()}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:  # does not follow a link that another user made
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.filename is None:  # a full disk's names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)
    fsync_path(path.parent)


def _remove_stale_temp_files(path: Path) -> None:
    """Delete what this host's killed processes have left of earlier attempts: of metrics.jsonl it may be gigabytes."""
    for other in path.parent.glob(f"{glob.escape(path.name)}.{_host()}.*.part"):
        number = other.name.split(".")[-2]
        if number.isdigit() and not _is_alive(int(number)):
            other.unlink(missing_ok=True)


def _host() -> str:
    """This machine's name: on a shared disk another one's processes have the same numbers."""
    return platform.node().replace(".", "-").replace("/", "-") or "localhost"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a hidden sibling that takes the place of `folder` only when the block ends without an error.

    Where the disk is full, OSError has the folder's name.
    """
    part, replaced = (folder.with_name(f".{folder.name}.{word}") for word in ("part", "replaced"))
    if replaced.exists() and not folder.exists():  # killed between the two renames below
        replaced.rename(folder)
    for left_over in (part, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        fsync_tree(part)
    except BaseException as error:
        is_full = (
            getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(part).free < _DISK_FULL_THRESHOLD_BYTES
        )
        shutil.rmtree(part)
        if is_full:  # said in many ways by those who write into the folder, and seldom with a name
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    if folder.exists():
        folder.rename(replaced)
    part.rename(folder)
    fsync_path(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def disk_usage_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 where there is nothing."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def fsync_tree(folder: Path) -> None:
    """Make a folder and all that lies in it outlast a power cut."""
    for path in (*folder.rglob("*"), folder):
        fsync_path(path)


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or the renames in a folder, outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole; the same value gives the same bytes."""
    with atomic_write(path) as file:
        file.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A JSON file's bytes; the same value gives the same."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def write_json_with_sha256(path: Path, value: Any) -> None:
    """Write a JSON file last of a folder's, and before it, beside it, its own SHA-256 as `sha256sum` writes it."""
    data = json_bytes(value)
    with atomic_write(path.with_suffix(".sha256")) as file:
        file.write(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())
    with atomic_write(path) as file:
        file.write(data)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises InputError where it is not whole."""
    try:
        return orjson.loads(read_regular_file(path))  # a full-size manifest has 12 MB: json would need a second for it
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore it, or make again what it belongs to") from None


def read_regular_file(path: Path, most_bytes: int = 1 << 28) -> bytes:
    """Return a file's bytes. Raises InputError for a pipe or a device, which may never end, and above `most_bytes`."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{path}: is no regular file; put the file itself there")
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise InputError(f"{path}: is larger than {most_bytes >> 20} MiB; restore it, or make again what it belongs to")
    return data


MAX_POINTER_BYTES = 1024
"""Size in bytes above which a file is no pointer of git's."""
# git-lfs's docs/spec.md; git-annex's documentation, "pointer file"
_POINTERS = {
    re.compile(rb"version https?://[\w.-]+/spec/v1\r?\n(.+\n)*oid sha256:"): ("git-lfs", "git lfs pull"),
    re.compile(rb"/annex/objects/"): ("git-annex", "git annex get"),
}


def git_pointer(data: bytes) -> tuple[str, str] | None:
    """Return what keeps a file in git's place of data, and the command that fetches the data; None for other bytes."""
    return next((found for pattern, found in _POINTERS.items() if pattern.match(data)), None)


def replacement_remedy(data: bytes) -> str:
    """Return the remedy for a file from elsewhere whose bytes, of which `data` are the first, cannot be used."""
    if pointer := git_pointer(data):
        return f"it is a {pointer[0]} pointer: fetch the file itself with `{pointer[1]}`"
    return "copy or download it again"


def is_inside(name: str) -> bool:
    """Return whether a relative path, read from a file, stays below the folder that it starts from."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def is_file_name(name: str) -> bool:
    """Return whether a name, read from a file, is that of one file or folder, without a path."""
    return Path(name).name == name and name not in ("", "..")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive_lock(folder: Path, lock: str, refusal: str) -> Iterator[None]:
    """Hold `folder/lock` while the block runs; a killed process lets go by itself, for the lock is the kernel's.

    Raises InputError, saying `refusal`, where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_without_following(folder / lock) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no child inherits it
        except (BlockingIOError, PermissionError):
            raise InputError(f"{refusal}; wait for it to end, or end it") from None
        own = _identity(os.fstat(file.fileno()))
        _locks_held_here.add(own)
        try:
            yield
        finally:
            _locks_held_here.discard(own)


_locks_held_here: set[tuple[int, int]] = set()
"""Locks of this process: it would lose one by opening and closing its file again, as fcntl(2) says."""
_FLOCK = "hhqqi"  # struct flock: type, whence, start, length, process


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def is_locked(path: Path) -> bool:
    """Whether this process or another holds this lock."""
    if not path.is_file():
        return False
    if _identity(path.stat()) in _locks_held_here:
        return True
    with path.open("rb") as file:
        answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0))
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


@contextmanager
def blocking_lock(path: Path) -> Iterator[None]:
    """Hold a lock while the block runs, having waited for who holds it."""
    with open_without_following(path) as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def find_escaping_symlinks(folder: Path) -> Iterator[Path]:
    """Yield every symbolic link below a folder that leads out of it."""
    here = folder.resolve()
    for inner, folders, files in os.walk(folder):
        for path in (Path(inner, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(here):
                yield path


def reject_symlinks(folder: Path) -> None:
    """Raise InputError where a symbolic link leads out of a folder that is to be written.

    `checkpoints` may be one, to an empty folder, which then gets a file that names `folder` as its user. W&B keeps
    links to its logs in `wandb`, and only W&B writes there.
    """
    for path in find_escaping_symlinks(folder):
        place = path.relative_to(folder).parts
        is_wandbs = place[0] == "wandb" and len(place) > 1
        if not is_wandbs and not (place == ("checkpoints",) and _is_own(path, folder)):
            reject_symlink(path)


def reject_symlink(path: Path) -> None:
    """Raise InputError where a path is a symbolic link: writing would change what it leads to."""
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link, and what it leads to would change; put the files there")


def _is_own(target: Path, folder: Path) -> bool:
    """Return whether a linked folder belongs to `folder`; an empty one does from now on."""
    owner, name = target / ".used-by", f"{folder.resolve()}\n"
    if target.is_dir() and not any(target.iterdir()):
        owner.write_text(name)
    return owner.is_file() and owner.read_text() == name


def open_without_following(path: Path) -> IO[bytes]:
    """Open a file to append to it; it is made where it is not there, and never emptied.

    Raises InputError where it is a symbolic link: a stranger's run may have one that leads to a file of yours.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            reject_symlink(path)
        raise
    return os.fdopen(descriptor, "ab", buffering=0)
