"""Where input files lie: local paths, folders, globs and fsspec URLs (`s3://…`) become files that can be opened.

Lists folders itself, since `Path.rglob`, `glob` and fsspec's `find` all leave out a folder that they may not read
without a word. A remote file is copied whole before it is read, so that what is hashed is what was read.
"""

import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import fsspec.callbacks  # type: ignore[import-untyped]
import fsspec.core  # type: ignore[import-untyped]

from tinyllama.errors import InputError, first_line
from tinyllama.files import sha256_of
from tinyllama.recipe.fields import check_protocol


@dataclass(frozen=True)
class FileEntry:
    """A file that a path stands for."""

    path: str
    """Local path or URL."""
    parts: tuple[str, ...]
    """Its folders and its name below the listed folder, or below a glob's first wildcard; none where it was named."""
    size: int
    """Bytes."""


def find_files(path: str, wanted: Callable[[str], bool], others: list[str] | None = None) -> list[FileEntry]:
    """Every file that a path, folder, glob or URL stands for, sorted by path.

    A folder, named or matched by a glob, stands for all files below it whose name is `wanted`, links followed; the
    paths of the rest are added to `others`. As in a shell, a name that begins with a dot is found only if the path or
    glob has the dot. Raises InputError where a folder or file cannot be read, or where a link leads back to a
    folder above it.
    """
    if _is_remote(path):
        with _reraise_with_path(path):
            _filesystem(path).invalidate_cache()
    else:
        path = str(Path(re.sub("^(file|local)://", "", path)))
    kind = _stat_kind(path)
    places: dict[str, tuple[str, ...]] = {path: ()} if kind == "file" else {}
    if kind != "file":
        everything = dict(_walk(path, (), ()) if kind else _glob(path))
        places = {file: parts for file, parts in everything.items() if wanted(file.rsplit("/", 1)[-1])}
        if others is not None:
            others += sorted(everything.keys() - places.keys())
    found = [FileEntry(file, places[file], size_of(file)) for file in sorted(places)]
    for file in found:
        if not _has_encoding(file.path):
            raise InputError(f"{file.path!a}: the name is not UTF-8, which no manifest can hold; rename it")
        if not _is_remote(file.path) and not Path(file.path).is_file():
            raise InputError(f"{file.path}: is no regular file, such as a pipe or a device; take it out")
        if not _is_remote(file.path) and not os.access(file.path, os.R_OK):
            raise InputError(f"{file.path}: no permission to read it; allow it, or take the file out")
    return found


def _has_encoding(path: str) -> bool:
    """Return whether a path can be encoded; bytes that are not UTF-8 are lone surrogates in it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def local_copy(path: str) -> Iterator[Path]:
    """A file as a local path: itself, or for a remote one a whole copy that is gone when the block ends.

    Raises InputError where it cannot be copied whole.
    """
    if not _is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="tinyllama-") as folder:
        local = Path(folder) / "input"
        with _reraise_with_path(path):
            if (size := _filesystem(path).size(path)) is None:
                raise InputError(f"{path}: its server does not state its size; download it by other means")
            _filesystem(path).get_file(path, str(local), callback=_Limit(path, size))
            if size != local.stat().st_size:
                raise EOFError(f"{local.stat().st_size} of {size} bytes arrived")
        yield local


class _Limit(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Ends a download that brings more than its server stated."""

    def __init__(self, path: str, size: int) -> None:
        super().__init__()
        self.path, self.most = path, size

    def relative_update(self, inc: int = 1) -> None:
        """Count bytes that have arrived. Raises InputError where they are too many."""
        self.most -= inc
        if self.most < 0:
            raise InputError(f"{self.path}: the server sends more than it stated; download it by other means")


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """A file open for reading from any place in it; of a remote one only what is read is fetched."""
    with ExitStack() as stack:
        with _reraise_with_path(path):
            file: BinaryIO
            if _is_remote(path):
                file = stack.enter_context(_filesystem(path).open(path, "rb"))
            else:
                file = stack.enter_context(Path(path).open("rb"))
        yield file


def size_of(path: str) -> int:
    """Bytes of a file. Raises InputError where it is not there."""
    with _reraise_with_path(path):
        return int(_filesystem(path).size(path) or 0) if _is_remote(path) else Path(path).stat().st_size


def modified_after(path: str, seconds: float) -> bool:
    """Whether a file was written at or after a time in seconds since 1970; False where its file system cannot say."""
    with _reraise_with_path(path):
        if not _is_remote(path):
            found = Path(path).stat()
            return max(found.st_mtime, found.st_ctime) >= seconds  # tools that keep the first cannot keep the second
        try:
            modified: datetime = _filesystem(path).modified(path)
        except NotImplementedError:
            return False
    return (modified if modified.tzinfo else modified.replace(tzinfo=UTC)).timestamp() >= seconds


def find_modified_input(record: Path, inputs: list[dict[str, Any]]) -> str | None:
    """The first input written after `record` whose bytes are not the recorded ones any more; None where all are."""
    written = record.stat().st_mtime
    for entry in inputs:
        path = str(entry["path"])
        if modified_after(path, written):
            with local_copy(path) as local:
                if sha256_of(local) != entry["sha256"]:
                    return path
    return None


def canonical_path(path: str) -> str:
    """One name for a file, by whichever links or spelling it was reached."""
    if _is_remote(path):
        return f"{path.split('://', maxsplit=1)[0]}://{_filesystem(path)._strip_protocol(path)}"
    folder, name = os.path.split(path)
    return os.path.realpath(path) if os.path.islink(path) else f"{_real_folder(folder)}/{name}"  # noqa: PTH114


@lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _is_remote(path: str) -> bool:
    return "://" in path and not path.startswith(("file://", "local://"))


def _filesystem(url: str) -> Any:
    """The fsspec file system of a URL. Raises InputError where its package is missing."""
    try:
        return fsspec.core.url_to_fs(check_protocol(url))[0]
    except ImportError as error:
        raise InputError(f"{url}: {error}; install what is missing, or copy the data to a local folder") from None
    except ValueError as error:
        raise InputError(f"{url}: {error}; correct the path, or copy the data to a local folder") from None


@contextmanager
def _reraise_with_path(path: str) -> Iterator[None]:
    """Turn what a file system raises into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each package behind fsspec has exceptions of its own
        raise InputError(f"{path}: cannot be read ({reason_of(error)}); {_remedy(error)}, or take it out") from None


def _remedy(error: Exception) -> str:
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return "correct the path"
        case PermissionError():
            return "allow it"
        case EOFError():
            return "try again"
        case OSError(errno=errno.ENOSPC):
            return f"free some space in {tempfile.gettempdir()} or set TMPDIR"
    return "see that it can be reached"


def reason_of(error: Exception) -> str:
    """What went wrong, in a few words on one line."""
    return getattr(error, "strerror", None) or first_line(error)


def _stat_kind(path: str) -> str | None:
    """Whether there is a `file` or a `folder` at a path; None where there is nothing."""
    with _reraise_with_path(path):
        try:
            if _is_remote(path):
                return "folder" if _filesystem(path).info(path)["type"] == "directory" else "file"
            return "folder" if stat.S_ISDIR(Path(path).stat().st_mode) else "file"
        except (FileNotFoundError, NotADirectoryError):
            return None


Place = tuple[str, tuple[str, ...]]
"""A file's path, and its `parts` as `Found` has them."""


def _glob(path: str) -> Iterator[Place]:
    """Yield every file that matches a glob; none where the path has no wildcard."""
    fixed = re.split(r"[*?[]", path, maxsplit=1)[0]
    folder = fixed[: fixed.rfind("/") + 1]
    return _iter_matches(folder, (), path[len(folder) :].split("/"), ()) if fixed != path else iter(())


def _iter_matches(folder: str, parts: tuple[str, ...], pattern: list[str], above: tuple[str, ...]) -> Iterator[Place]:
    """The files of a folder that a glob stands for, of which `pattern` is left to match."""
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        yield from _iter_matches(folder, parts, rest or ["*"], above)
        if not rest:
            return
    inside = (*above, _check_symlink_loop(folder, above))
    for name, is_folder in _entries(folder):
        path, below = _join(folder, name), (*parts, name)
        if head == "**":
            if is_folder and not name.startswith("."):
                yield from _iter_matches(path, below, pattern, inside)
        elif fnmatchcase(name, head) and (head.startswith(".") or not name.startswith(".")):
            if rest and is_folder:
                yield from _iter_matches(path, below, rest, ())
            elif is_folder:
                yield from _walk(path, below, ())
            elif not rest:
                yield path, below


def _walk(folder: str, parts: tuple[str, ...], above: tuple[str, ...]) -> Iterator[Place]:
    """The files of a folder and of all folders in it; `above` are the folders that it lies in, resolved."""
    inside = (*above, _check_symlink_loop(folder, above))
    for name, is_folder in _entries(folder):
        path, below = _join(folder, name), (*parts, name)
        if name.startswith("."):
            continue
        if is_folder:
            yield from _walk(path, below, inside)
        else:
            yield path, below


def _check_symlink_loop(folder: str, above: tuple[str, ...]) -> str:
    """A folder's own path, links resolved, once it is sure that it does not stand in itself."""
    real = folder if _is_remote(folder) else os.path.realpath(folder)
    if real in above:
        raise InputError(f"{folder}: is a link to {real}, which it stands in; remove the link")
    return real


def _entries(folder: str) -> list[tuple[str, bool]]:
    """Names in a folder, and whether each is a folder itself."""
    with _reraise_with_path(folder or "."):
        if not _is_remote(folder):
            with os.scandir(folder or ".") as entries:
                return [(entry.name, entry.is_dir()) for entry in entries]
        filesystem = _filesystem(folder)
        own = filesystem._strip_protocol(folder).rstrip("/")
        listed = [
            (entry["name"].rstrip("/"), entry["type"] == "directory") for entry in filesystem.ls(folder, detail=True)
        ]
        return [(name.rsplit("/", 1)[-1], is_folder) for name, is_folder in listed if name != own]  # S3 lists it too


def _join(folder: str, name: str) -> str:
    return f"{folder}{name}" if not folder or folder.endswith("/") else f"{folder}/{name}"
