"""Listing and opening of raw files, which a recipe names by paths, folders, globs or fsspec URLs (`s3://…`).

This module lists folders itself, because `glob` and fsspec's `find` and `walk` silently skip a folder without read
permission. A remote file is downloaded completely before it is read, so that its hash covers the bytes that are read.
"""

import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import translate
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import fsspec.callbacks  # type: ignore[import-untyped]
import fsspec.core  # type: ignore[import-untyped]
import pyarrow

from tinyllama.errors import InputError, first_line
from tinyllama.files import sha256_of
from tinyllama.recipe.loading import check_protocol


@dataclass(frozen=True)
class FileEntry:
    """A file that a path, folder, glob or URL refers to."""

    path: str
    """Local path or URL."""
    parts: tuple[str, ...]
    """Folders and name below the listed folder or the glob's fixed folder; empty if the path is the file itself."""
    size: int
    """Size in bytes."""


def find_files(
    path: str,
    is_wanted: Callable[[str], bool],
    unwanted: list[str] | None = None,
    takes_named: bool = False,
) -> list[FileEntry]:
    """Return every file that a path, folder, glob or URL refers to, sorted by path.

    Folders are searched recursively, through symbolic links, for files whose names satisfy `is_wanted`. The paths of
    other files are appended to `unwanted`. If `takes_named`, a file that a glob matches by its own name need not
    satisfy `is_wanted`. In a glob, `{a,b}` means `a` or `b`, once per name. As in a shell, names that begin with a dot
    match only a pattern that begins with a dot. Raises InputError if a folder or file cannot be read, or if a symbolic
    link leads back to a folder that contains the link.
    """
    if is_remote(path):
        with translate_read_errors(path):
            _filesystem(path).invalidate_cache()
    else:
        path = str(Path(_without_scheme(path)))
    kind = _stat_kind(path)
    found: dict[str, tuple[str, ...]] = {}
    if kind == "file":
        found[path] = ()
    else:
        folder, pattern = (path, ()) if kind else _split_glob(path)
        for file, parts in _walk(folder, (), pattern, ()) if kind or pattern else ():
            if is_wanted(parts[-1]) or (takes_named and pattern and _matches(parts, pattern, False, below=False)):
                found[file] = parts
            elif unwanted is not None:
                unwanted.append(file)
    files = [FileEntry(file, found[file], file_size(file)) for file in sorted(found)]
    for entry in files:
        _check_file(entry.path)
    return files


def _check_file(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:  # Python represents bytes that are not UTF-8 as lone surrogates
        raise InputError(f"{path!a}: the name is not UTF-8, so no manifest can list it; rename the file") from None
    if is_remote(path):
        return
    if not Path(path).is_file():
        raise InputError(f"{path}: not a regular file (for example, a pipe or a device); remove it")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: no permission to read it; grant the permission, or remove the file")


@contextmanager
def local_copy(path: str) -> Iterator[Path]:
    """Yield a file's local path; a remote file is downloaded to a temporary copy that exists until the block ends.

    Raises InputError if the file cannot be downloaded completely.
    """
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="tinyllama-") as folder:
        local = Path(folder) / "input"
        with translate_read_errors(path):
            if (size := _filesystem(path).size(path)) is None:
                raise InputError(f"{path}: the server does not report the file's size; copy the file to a local folder")
            _filesystem(path).get_file(path, str(local), callback=_DownloadLimit(path, size))
            if size != local.stat().st_size:
                raise EOFError(f"{local.stat().st_size} of {size} bytes received")
        yield local


class _DownloadLimit(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Callback that stops a download if the server sends more bytes than it reported."""

    def __init__(self, path: str, size: int) -> None:
        super().__init__()
        self.path, self.remaining = path, size

    def relative_update(self, inc: int = 1) -> None:
        """Count received bytes. Raises InputError if the total exceeds the limit."""
        self.remaining -= inc
        if self.remaining < 0:
            raise InputError(f"{self.path}: the server sends more bytes than reported; copy the file to a local folder")


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading at any position; for a remote file, download only the bytes that are read."""
    with translate_read_errors(path):
        file: BinaryIO = _filesystem(path).open(path, "rb") if is_remote(path) else Path(path).open("rb")  # noqa: SIM115
    with file:
        yield file


def file_size(path: str) -> int:
    """Return the size of a file in bytes. Raises InputError if the file does not exist."""
    with translate_read_errors(path):
        return int(_filesystem(path).size(path) or 0) if is_remote(path) else Path(path).stat().st_size


def modified_after(path: str, seconds: float) -> bool:
    """Return whether a file was modified at or after the Unix time `seconds`; False if this is unknown."""
    with translate_read_errors(path):
        if not is_remote(path):
            found = Path(path).stat()
            return max(found.st_mtime, found.st_ctime) >= seconds  # tools can restore mtime but not ctime
        try:
            modified: datetime = _filesystem(path).modified(path)
        except NotImplementedError:
            return False
    return (modified if modified.tzinfo else modified.replace(tzinfo=UTC)).timestamp() >= seconds


def find_modified_input(record: Path, inputs: list[dict[str, Any]]) -> str | None:
    """Return the first of `inputs` that is newer than the file `record` and does not have its listed hash.

    Returns None if there is no such input.
    """
    written = record.stat().st_mtime
    for entry in inputs:
        path = str(entry["path"])
        if modified_after(path, written):
            with local_copy(path) as local:
                if sha256_of(local) != entry["sha256"]:
                    return path
    return None


def canonical_path(path: str) -> str:
    """Return a path that is the same for all spellings of a file's path and all symbolic links to the file."""
    if is_remote(path):
        return f"{path.split('://', maxsplit=1)[0]}://{_filesystem(path)._strip_protocol(path)}"
    path = _without_scheme(path)
    folder, name = os.path.split(path)
    return os.path.realpath(path) if os.path.islink(path) else f"{_real_folder(folder)}/{name}"  # noqa: PTH114


def is_output(path: str) -> bool:
    """Return whether a path is in the folder `runs` of the working directory, in which tinyllama writes its results."""
    return not is_remote(path) and canonical_path(path).startswith(f"{_real_folder('runs')}/")


def _real_folder(folder: str) -> str:
    return _resolve(folder, os.getcwd())  # noqa: PTH109 - called for every file, and faster than Path.cwd()


@lru_cache(maxsize=1024)
def _resolve(folder: str, working_directory: str) -> str:
    return os.path.realpath(folder)


def is_remote(path: str) -> bool:
    """Return whether a path is a URL of another file system than the local one."""
    return "://" in path and not path.startswith(("file://", "local://"))


def _without_scheme(path: str) -> str:
    """Return a local path without the scheme of a URL."""
    return re.sub("^(file|local)://", "", path)


def _filesystem(url: str) -> Any:
    """Return the fsspec file system of a URL. Raises InputError if the URL is invalid or a package is missing."""
    try:
        return fsspec.core.url_to_fs(check_protocol(url))[0]
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{url}: {error}; correct the path, install the package, or copy the data to a local folder"
        ) from None


@contextmanager
def translate_read_errors(path: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Convert errors of the classes `kinds` to an InputError that names the file.

    By default, every error is converted, since fsspec raises many classes.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except kinds as error:
        match error:
            case FileNotFoundError() | NotADirectoryError():
                remedy = "correct the path"
            case _ if re.search("requires too much memory|Memory usage limit", str(error)):
                remedy = "recompress it with a window of at most 128 MiB, for example with zstd -19 or xz -9"
            case PermissionError():
                remedy = "grant read permission"
            case OSError(errno=errno.ENOSPC):
                remedy = f"free some space in {tempfile.gettempdir()} or set TMPDIR"
            case pyarrow.ArrowNotImplementedError():
                remedy = "rewrite it without the features that pyarrow lacks"
            case UnicodeDecodeError():
                remedy = "rewrite it with column names in UTF-8"
            case pyarrow.ArrowInvalid():
                remedy = "fetch it again, correct its suffix or format"
            case _:
                remedy = "fetch it again, check that it can be reached"
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: cannot be read ({reason}); {remedy}, or exclude it") from None


def _stat_kind(path: str) -> str | None:
    """Return `file` or `folder`, or None if nothing exists at the path."""
    with translate_read_errors(path):
        try:
            if is_remote(path):
                return "folder" if _filesystem(path).info(path)["type"] == "directory" else "file"
            return "folder" if stat.S_ISDIR(Path(path).stat().st_mode) else "file"
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # a glob of many names
                return None
            raise


def _split_glob(path: str) -> tuple[str, tuple[str, ...]]:
    """Return a glob's fixed folder and the pattern below it; the pattern is empty if the path has no wildcard."""
    fixed = re.split(r"[*?[{]", path, maxsplit=1)[0]
    folder = fixed[: fixed.rfind("/") + 1]
    return folder, tuple(path[len(folder) :].split("/")) if fixed != path else ()


def iter_folder(folder: str) -> Iterator[str]:
    """Yield the path of every file in a folder and its subfolders, except names that begin with a dot.

    Raises InputError if a folder cannot be read, or if a symbolic link leads back to a folder that contains the link.
    """
    return (path for path, _ in _walk(folder, (), (), ()))


def _walk(
    folder: str, parts: tuple[str, ...], pattern: tuple[str, ...], ancestors: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the path and parts (see `FileEntry`) of every file that matches a pattern below a folder.

    `parts` are the folder names from the first folder of the walk to this folder, and `ancestors` are the resolved
    paths of the folders that contain it.
    """
    real = folder if is_remote(folder) else os.path.realpath(folder)
    if real in ancestors:
        raise InputError(f"{folder}: a symbolic link to {real}, which contains the link; remove the link")
    for name, is_folder in _list_folder(folder):
        path = f"{folder}{name}" if not folder or folder.endswith("/") else f"{folder}/{name}"
        if _matches((*parts, name), pattern, is_folder):
            if is_folder:
                yield from _walk(path, (*parts, name), pattern, (*ancestors, real))
            else:
                yield path, (*parts, name)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...], is_folder: bool, below: bool = True) -> bool:
    """Return whether a file matches a pattern, or whether a folder can contain files that match it.

    If `below`, a pattern also matches everything below a folder that it matches, except names that begin with a dot.
    """
    if not pattern:
        return not parts or (below and not any(part.startswith(".") for part in parts))
    if not parts:
        return is_folder
    head, rest, is_hidden = pattern[0], pattern[1:], parts[0].startswith(".")
    if head == "**":
        if _matches(parts, rest or ("*",), is_folder, below):
            return True
        return not is_hidden and _matches(parts[1:], pattern, is_folder, below)
    if is_hidden and not head.startswith("."):
        return False
    return _compile(head).match(parts[0]) is not None and _matches(parts[1:], rest, is_folder, below)


@lru_cache(maxsize=256)
def _compile(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern for one name; its first `{a,b}` means `a` or `b`, as in a shell."""
    braces = re.fullmatch(r"(.*?)\{([^{}]*,[^{}]*)\}(.*)", pattern, re.DOTALL)
    names = [f"{braces[1]}{choice}{braces[3]}" for choice in braces[2].split(",")] if braces else [pattern]
    return re.compile("|".join(map(translate, names)))


def _list_folder(folder: str) -> list[tuple[str, bool]]:
    """Return the names in a folder, each with a flag that is True for a subfolder."""
    with translate_read_errors(folder or "."):
        if not is_remote(folder):
            with os.scandir(folder or ".") as entries:
                return [(entry.name, entry.is_dir()) for entry in entries]
        filesystem = _filesystem(folder)
        own = filesystem._strip_protocol(folder).rstrip("/")
        listed = [
            (entry["name"].rstrip("/"), entry["type"] == "directory") for entry in filesystem.ls(folder, detail=True)
        ]
        # On S3, the listing of a folder includes the folder itself.
        return [(name.rsplit("/", 1)[-1], is_folder) for name, is_folder in listed if name != own]
