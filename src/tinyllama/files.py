"""Files: atomic writes, locks, JSON, JSON Lines, hashes and symbolic links.

An atomic write creates a temporary file in the same folder, flushes the file to disk and renames the file.
"""

import errno
import fcntl
import glob
import hashlib
import io
import itertools
import json
import os
import platform
import re
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tinyllama.errors import InputError
from tinyllama.strict_json import json_bytes, parse_json

Row = dict[str, Any]
"""One line of a JSON Lines file."""
_CHUNK_BYTES = 1 << 22
"""Number of bytes that `rows_since` reads per call: about 20,000 rows of metrics."""
_MAX_LINE_BYTES = 1 << 20
"""Maximum size of a line in bytes; a sparse file can have a line of any size."""
_FULL_DISK_BYTES = 1 << 20
"""Free space in bytes below which a disk counts as full."""


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary binary file that is renamed to `path` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_temp_files(path)
    part = path.with_name(f"{path.name}.{_host()}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:  # mode x fails at a symbolic link, which another user may have created
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.filename is None:  # the error for a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)
    fsync_path(path.parent)


def _remove_stale_temp_files(path: Path) -> None:
    """Delete temporary files of killed processes on this host; each file may occupy several gigabytes."""
    for other in path.parent.glob(f"{glob.escape(path.name)}.{_host()}.*.part"):
        number = other.name.split(".")[-2]
        if number.isdigit() and not _is_alive(int(number)):
            other.unlink(missing_ok=True)


def _host() -> str:
    """Return this machine's name, which distinguishes processes with equal IDs on machines that share a disk."""
    return platform.node().replace(".", "-").replace("/", "-") or "localhost"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        pass
    return True


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `folder` that replaces `folder` if the block ends without an error.

    Raises OSError with the folder's name if the disk is full.
    """
    part, replaced = (folder.with_name(f".{folder.name}.{word}") for word in ("part", "replaced"))
    if replaced.exists() and not folder.exists():  # killed between the two renames below
        replaced.rename(folder)
    for stale in (part, replaced):
        shutil.rmtree(stale, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        fsync_tree(part)
    except BaseException as error:
        is_full = getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(part).free < _FULL_DISK_BYTES
        shutil.rmtree(part)
        if is_full:  # libraries report a full disk in many ways, mostly without the name of a file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    if folder.exists():
        folder.rename(replaced)
    part.rename(folder)
    fsync_path(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def disk_usage_bytes(path: Path) -> int:
    """Return the size in bytes of a file, or of all files below a folder; 0 if the path does not exist."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def fsync_tree(folder: Path) -> None:
    """Flush a folder and its contents to disk, so that they survive a power failure."""
    for path in (*folder.rglob("*"), folder):
        fsync_path(path)


def fsync_path(path: Path) -> None:
    """Flush a file's bytes, or a folder's list of entries, to disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; equal values produce equal bytes."""
    with atomic_write(path) as file:
        file.write(json_bytes(value))


def write_json_with_sha256(path: Path, value: Any) -> None:
    """Write the SHA-256 of a JSON file to a .sha256 file in the format of `sha256sum`, then write the JSON file."""
    data = json_bytes(value)
    with atomic_write(path.with_suffix(".sha256")) as file:
        file.write(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())
    with atomic_write(path) as file:
        file.write(data)


def read_json(path: Path) -> Any:
    """Return the value of a JSON file. Raises InputError if the file is not valid JSON."""
    try:
        return parse_json(read_regular_file(path))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore it, or create it again") from None


def read_json_if_exists(path: Path) -> Any | None:
    """Return the value of a JSON file, or None if there is no file. Raises InputError if the file is not valid JSON."""
    return read_json(path) if path.is_file() else None


def numbered_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each complete line of a JSONL file.

    A line that is not JSON or is longer than `_MAX_LINE_BYTES` has the value None.
    """
    if not path.is_file():
        return
    with path.open("rb", buffering=_MAX_LINE_BYTES) as file:
        for number in itertools.count(1):
            line = end = file.readline(_MAX_LINE_BYTES)
            while len(end) == _MAX_LINE_BYTES and not end.endswith(b"\n"):
                line, end = b"", file.readline(_MAX_LINE_BYTES)
            if not end.endswith(b"\n"):
                return
            yield number, _parse(line)


def _parse(line: bytes) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def rows_since(path: Path, offset: int) -> tuple[list[Row], int]:
    """Return the next rows after byte `offset`, and the offset of the byte after these rows.

    Each call reads at most `_CHUNK_BYTES` bytes, and returns no rows at the end of the file. If the file has become
    shorter than `offset`, reading starts from the beginning. Raises InputError, with the line number, if a line is not
    a row with a step.
    """
    if not path.is_file():
        return [], offset
    with path.open("rb") as file:
        if offset > os.fstat(file.fileno()).st_size:
            offset = 0
        file.seek(offset)
        chunk = file.read(_CHUNK_BYTES)
    data = chunk[: chunk.rfind(b"\n") + 1]
    rows = [_parse(line) for line in data.splitlines()]
    if not all(map(_has_step, rows)) or len(chunk) - len(data) > _MAX_LINE_BYTES:
        number = next((number for number, row in numbered_rows(path) if not _has_step(row)), "last line")
        raise InputError(f"{path}:{number}: not a row of JSON with a step; correct or delete the line")
    return rows, offset + len(data)


def _has_step(row: Any) -> bool:
    return isinstance(row, dict) and "step" in row


def last_rows(path: Path, num_bytes: int) -> list[Row]:
    """Return the rows in the last `num_bytes` of a file; skip lines that are not rows."""
    if path.is_fifo() or not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - num_bytes)
        file.seek(start)
        data = file.read(num_bytes)
    lines = data[: data.rfind(b"\n") + 1].splitlines()[1 if start else 0 :]
    return [row for row in map(_parse, lines) if isinstance(row, dict)]


_MAX_FILE_BYTES = 1 << 28
"""Maximum size in bytes of a file that is read at once: all files except weights, tokens and rows."""


def read_regular_file(path: Path) -> bytes:
    """Return a file's bytes. Raises InputError if the file is a pipe, a device or too large."""
    with _open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        reject_large_file(path, size)
        return io.BufferedReader(file).read(size)


def reject_large_file(path: Path, num_bytes: int) -> None:
    """Raise InputError if a file is too large to be read at once."""
    if num_bytes > _MAX_FILE_BYTES:
        raise InputError(f"{path}: is larger than {_MAX_FILE_BYTES >> 20} MiB; restore it, or create it again")


def _open_regular_file(path: Path, flags: int = os.O_RDONLY) -> io.FileIO:
    """Open a file without buffering. Raises InputError if the path is a pipe, which can block, or a device."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a pipe without a reader
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return io.FileIO(descriptor, "rb" if flags == os.O_RDONLY else "ab")
        os.close(descriptor)
    raise InputError(f"{path}: not a regular file; replace it with a regular file")


MAX_POINTER_BYTES = 1024
"""Maximum size in bytes of a pointer file of git-lfs or git-annex."""
# Specified in git-lfs's docs/spec.md and in git-annex's documentation ("pointer file").
_POINTERS = {
    re.compile(rb"version https?://[\w.-]+/spec/v1\r?\n(.+\n)*oid sha256:"): ("git-lfs", "git lfs pull"),
    re.compile(rb"/annex/objects/"): ("git-annex", "git annex get"),
}


def git_pointer(data: bytes) -> tuple[str, str] | None:
    """Return the git extension that wrote a pointer file, and its fetch command; None if `data` is not a pointer."""
    return next((found for pattern, found in _POINTERS.items() if pattern.match(data)), None)


def replacement_remedy(data: bytes) -> str:
    """Return the remedy for an invalid downloaded file that begins with the bytes `data`."""
    if pointer := git_pointer(data):
        return f"it is a {pointer[0]} pointer: fetch the file itself with `{pointer[1]}`"
    return "copy or download it again"


def is_inside(name: str) -> bool:
    """Return whether a path that was read from a file is relative and stays inside its base folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def is_file_name(name: str) -> bool:
    """Return whether a name that was read from a file is a single path component."""
    return Path(name).name == name and name not in ("", "..")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with _open_regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LockHeldError(InputError):
    """Another process holds a lock."""


@contextmanager
def exclusive_lock(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of the file `path` while the block runs; the kernel releases the lock of a killed process.

    Raises InputError with the message `refusal` if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_without_following(path) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike with flock(2), children do not inherit this lock
        except (BlockingIOError, PermissionError):
            raise LockHeldError(f"{refusal}; wait until that process ends, or stop it") from None
        own = _identity(os.fstat(file.fileno()))
        _locks_held_here.add(own)
        try:
            yield
        finally:
            _locks_held_here.discard(own)


_locks_held_here: set[tuple[int, int]] = set()
"""Locks that this process holds; opening and closing such a lock's file again would release the lock (fcntl(2))."""
_FLOCK = "hhqqi"  # struct flock: type, whence, start, length, process


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def is_locked(path: Path) -> bool:
    """Return whether any process holds the lock of the file `path`."""
    if not path.is_file():
        return False
    if _identity(path.stat()) in _locks_held_here:
        return True
    with path.open("rb") as file:
        answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0))
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


@contextmanager
def blocking_lock(path: Path) -> Iterator[None]:
    """Wait for the lock of the file `path`, and hold the lock while the block runs."""
    with open_without_following(path) as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def find_escaping_symlinks(folder: Path) -> Iterator[Path]:
    """Yield every symbolic link below a folder that leads out of the folder."""
    here = folder.resolve()
    for inner, folders, files in os.walk(folder):
        for path in (Path(inner, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(here):
                yield path


def reject_symlinks(folder: Path, is_run: bool = False) -> None:
    """Check that `folder`, which will be written to, has no pipe and no symbolic link that leads out of `folder`.

    Raises InputError otherwise, but accepts two kinds of links in a run. `checkpoints` may be a link to an empty
    folder. A file in the linked folder then records the path of `folder`, and links from other folders are rejected.
    The folder of a W&B run may have a link to the log of W&B's process.
    """
    for path in find_escaping_symlinks(folder):
        place = path.relative_to(folder)
        is_log = len(place.parts) == 4 and place.match("wandb/*/logs/debug-core.log")
        if not is_run or not (is_log or (place == Path("checkpoints") and _is_used_by(path, folder))):
            reject_symlink(path)
    for path in folder.rglob("*"):
        if path.is_fifo():
            raise InputError(f"{path}: not a regular file; delete it")


def reject_symlink(path: Path) -> None:
    """Raise InputError if a path is a symbolic link, because writing would change the link's target."""
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link, and writing would change its target; replace the link")


def _is_used_by(target: Path, folder: Path) -> bool:
    """Return whether the linked folder `target` belongs to `folder`; first assign an empty `target` to `folder`."""
    owner, name = target / ".used-by", f"{folder.resolve()}\n"
    if target.is_dir() and not any(target.iterdir()):
        owner.write_text(name)
    return owner.is_file() and read_regular_file(owner) == name.encode()


def open_without_following(path: Path) -> IO[bytes]:
    """Open a file for appending, and create the file if it does not exist.

    Raises InputError if the path is a symbolic link or not a regular file. In another user's run folder, a link could
    lead to a file of the user who runs this process.
    """
    try:
        return _open_regular_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            reject_symlink(path)
        raise
