"""Which files a source has, in which split, and their rows.

Files come sorted by path, so no listing order matters. What the recipe names must be there and no file may be read
twice: both are checked here, before any work is done. Files that are there but not read are counted by their endings.
"""

import codecs
import lzma
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow

from tinyllama.errors import InputError
from tinyllama.files import MAX_POINTER_BYTES, git_pointer, read_json
from tinyllama.prepare.columnar import parquet_columns
from tinyllama.prepare.endings import endings_of, is_read, packing_of, split_ending, unread
from tinyllama.prepare.files import FileEntry, canonical_path, find_files, local_copy, open_input, reason_of
from tinyllama.prepare.lines import unpacked
from tinyllama.prepare.rows import RejectedRow, SourceRow, begins_longer_json, iter_rows, language_of, text_field
from tinyllama.recipe import SLIMPAJAMA_SUBSETS, Source
from tinyllama.recipe.loading import suggest

__all__ = ["InputFile", "RejectedRow", "SourceRow", "check_sources_disjoint", "list_files", "read_rows"]

_UNREADABLE = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, pyarrow.ArrowException)
"""What the readers of a file raise where it is damaged or of another kind."""
_NO_LINES = "ending .json without one JSON object per line"
_HEAD_BYTES = 1 << 16
_MOST_REJECTED = 1_000_000
_MOST_NAMED = 5  # endings, in a message
# The hub's words for a split, as in datasets/data_files.py, and the names there of files that are about the data.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_METADATA_FILES = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


@dataclass(frozen=True)
class InputFile:
    """A raw file and the split that its place puts it in."""

    path: str
    """Local path or URL."""
    split: str
    """`train` or `validation`."""
    size: int
    """Bytes."""


def list_files(name: str, source: Source, left_out: Counter[str] | None = None) -> list[InputFile]:
    """Every file of a source, sorted by path; the files under its path that are not read are counted in `left_out`.

    Raises InputError where there is none, one cannot be read or would be read twice, a folder that the recipe names
    is not there, or a folder of Starcoderdata has other columns.
    """
    left_out = Counter() if left_out is None else left_out
    others: list[str] = []
    found = find_files(source.path, lambda file: is_read(file, source.format), others)
    left_out.update(unread(other) for other in others)
    if source.format == "starcoderdata":
        found = _languages(name, source, found, left_out)
    elif source.format == "huggingface":
        found = _data_files(name, source, found, left_out)
    else:
        found = _with_lines(found, left_out)
    placed = [InputFile(file.path, _split(file, source), file.size) for file in found]
    files = [file for file in placed if file.split != "test"]
    if len(files) < len(placed):
        left_out["test split"] += len(placed) - len(files)
    if not files:
        raise _nothing(name, source, left_out)
    _check_no_duplicate_files(name, files)
    return files


def _nothing(name: str, source: Source, left_out: Counter[str]) -> InputError:
    """Why a source has no files: there are none, or only ones that it does not read."""
    there = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common(_MOST_NAMED))
    rest = f" (files not read: {there})" if there else ""
    remedy = "correct path, or put the data there"
    if _NO_LINES in left_out:
        remedy = "convert the files, one JSON object per line is expected"
    elif any("ending" in reason for reason in left_out):
        remedy = "correct path or format, or convert the files"
    elif there:
        remedy = "correct path, include or exclude"
    return InputError(f"data.sources.{name}: no {endings_of(source.format)} under {source.path}{rest}; {remedy}")


def read_rows(path: str, source: Source, local: Path | None = None) -> Iterator[SourceRow | RejectedRow]:
    """Every row of a file, used or not; `local` is its copy where it was fetched already.

    Raises InputError where the file cannot be read to its end, or is a pointer of git's instead of the data.
    """
    if local is None:
        with local_copy(path) as copy:
            yield from read_rows(path, source, copy)
        return
    try:
        if local.stat().st_size <= MAX_POINTER_BYTES:
            _refuse_pointer(path, local.read_bytes())
        yield from _counted(iter_rows(local, path, source), path)
    except MemoryError:  # arrow's is one of its own exceptions too
        raise
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be read to its end ({reason_of(error)}); {_remedy(error)}") from None


def _counted(rows: Iterator[SourceRow | RejectedRow], path: str) -> Iterator[SourceRow | RejectedRow]:
    """Yield rows. Raises InputError if more than a million are rejected, and more than are used."""
    usable = rejected = 0
    for row in rows:
        if isinstance(row, SourceRow):
            usable += 1
        else:
            rejected += not row.is_intentional
            if rejected > _MOST_REJECTED and rejected > usable:
                raise InputError(f"{path}: {rejected:,} rows are rejected, the last as {row.reason!r}; take it out")
        yield row
        del row  # else its text is in memory while the next one is read


def _remedy(error: Exception) -> str:
    match error:
        case pyarrow.ArrowNotImplementedError():
            return "write it again without what pyarrow lacks, or take it out"
        case UnicodeDecodeError():
            return "write it again with names in UTF-8, or take it out"
        case pyarrow.ArrowInvalid():
            return "fetch it again, or correct its ending and format if it is of another kind"
        case PermissionError():
            return "allow it or take it out"
    return "fetch it again or take it out"


def _refuse_pointer(path: str, content: bytes) -> None:
    """Raise InputError where a file is a pointer of git's instead of data."""
    if pointer := git_pointer(content):
        kept_by, command = pointer
        raise InputError(
            f"{path}: is a {kept_by} pointer, not the data itself; run `{command}` in its repository, then again"
        )


def check_sources_disjoint(sources: Mapping[str, Source], files: Mapping[str, Sequence[InputFile]]) -> None:
    """Raise InputError where two sources read the same file, unless SlimPajama's subsets keep their rows apart."""
    readers: dict[str, list[str]] = {}
    for name, own in files.items():
        for file in own:
            others = readers.setdefault(canonical_path(file.path), [])
            for other in others:
                if not _are_disjoint(sources[name], sources[other]):
                    raise InputError(
                        f"data.sources.{name}: {file.path} is read by {other} too; take it out of one of the two"
                    )
            others.append(name)


def _are_disjoint(one: Source, other: Source) -> bool:
    """Whether two sources that read the same files take no row in common."""
    if not one.format == other.format == "slimpajama" or not (one.include or other.include):
        return False  # rows of a subset unknown to us belong to every source that only excludes
    return not _chosen(one) & _chosen(other)


def _chosen(source: Source) -> set[str]:
    return set(source.include or SLIMPAJAMA_SUBSETS) - set(source.exclude)


def _split(file: FileEntry, source: Source) -> str:
    """The split that a file's folders and name put it in, by the hub's rule: the first word that names one counts."""
    if source.format in ("slimpajama", "huggingface"):
        for part in file.parts:
            for word in re.split(r"[-._ 0-9]+", part.lower()):
                if split := _SPLITS.get(word):
                    return split
    return "train"


def _check_no_duplicate_files(name: str, files: list[InputFile]) -> None:
    first: dict[str, str] = {}
    by_stem: dict[str, str] = {}
    for file in files:
        other = first.setdefault(canonical_path(file.path), file.path)
        if other != file.path:
            raise InputError(
                f"data.sources.{name}: {other} and {file.path} are one file, which would count twice; remove the link"
            )
        other = by_stem.setdefault(split_ending(file.path)[0], file.path)
        if other != file.path and _head(file.path) == _head(other):
            raise InputError(
                f"data.sources.{name}: {other} and {file.path} begin with the same text, which would count twice; "
                "remove one, or name one kind of files by a glob"
            )


def _head(path: str) -> bytes:
    """The first bytes of a file, unpacked; of one that cannot be read, its name."""
    try:
        with open_input(path) as file:
            chunks = unpacked(pyarrow.PythonFile(file), packing_of(path))
            return b"".join(islice(chunks, 1))[:_HEAD_BYTES]
    except _UNREADABLE:
        return path.encode(errors="replace")  # reading it reports the fault


def _with_lines(found: list[FileEntry], left_out: Counter[str]) -> list[FileEntry]:
    """The files without those called .json that do not hold an object per line, such as a data set's description."""
    kept = [
        file for file in found if not file.parts or split_ending(file.path)[1:] != (".json", "") or _has_lines(file)
    ]
    if len(kept) < len(found):
        left_out[_NO_LINES] += len(found) - len(kept)
    return kept


def _has_lines(file: FileEntry) -> bool:
    if Path(file.path).name in _METADATA_FILES:
        return False
    head = _head(file.path).removeprefix(codecs.BOM_UTF8).lstrip()
    if file.size <= MAX_POINTER_BYTES:
        _refuse_pointer(file.path, head)
    line, end, _ = head.partition(b"\n")
    return not head or (line[:1] == b"{" and not (end and begins_longer_json(line)))


def _languages(name: str, source: Source, found: list[FileEntry], left_out: Counter[str]) -> list[FileEntry]:
    """The files of the languages that the recipe chooses; the first of each must have the column that is read."""
    folders: dict[str, list[FileEntry]] = {}
    for file in found:
        folders.setdefault(language_of(file.path), []).append(file)
    for choice in ("include", "exclude"):
        for folder in getattr(source, choice):
            if folder not in folders:
                raise InputError(
                    f"data.sources.{name}.{choice}: {folder!r} is no folder of {source.path}; "
                    f"{suggest(folder, sorted(folders))}"
                )
    chosen = {folder for folder in source.include or folders if folder not in source.exclude}
    left_out.update({f"excluded: {folder}": len(folders[folder]) for folder in folders.keys() - chosen})
    _check_columns(name, {folder: folders[folder][0] for folder in sorted(chosen)}, text_field(source))
    return [file for file in found if language_of(file.path) in chosen]


def _check_columns(name: str, files: dict[str, FileEntry], column: str) -> None:
    """Raise InputError with every folder whose file lacks the column, and what it has instead."""
    lacking = {}
    for folder, file in files.items():
        try:
            with open_input(file.path) as content:
                if file.size <= MAX_POINTER_BYTES:
                    _refuse_pointer(file.path, content.read())
                present = parquet_columns(content)
        except _UNREADABLE as error:
            raise InputError(f"{file.path}: cannot be read ({reason_of(error)}); {_remedy(error)}") from None
        if column not in present:
            lacking[folder] = ", ".join(present)
    if lacking:
        which = "; ".join(f"{folder} (it has {columns})" for folder, columns in lacking.items())
        raise InputError(
            f"data.sources.{name}: no column {column!r} in {which}; exclude {', '.join(lacking)}, or give each a "
            f"source of its own with include: [{next(iter(lacking))}] and text: COLUMN"
        )


def _data_files(name: str, source: Source, found: list[FileEntry], left_out: Counter[str]) -> list[FileEntry]:
    """The files of a data set's folder that hold its rows: of what `datasets` saved, those that its state names."""
    data = found
    for state in [file for file in data if Path(file.path).name == "state.json"]:
        if (named := _saved_files(state.path)) is None:
            continue
        if missing := sorted(named - {file.path for file in data}):
            raise InputError(f"{missing[0]}: is not there, but {state.path} names it; save the data set again")
        folder = state.path.removesuffix("state.json")
        # Beside the saved files lie caches of what was once computed from them.
        data = [file for file in data if not file.path.startswith(folder) or file.path in named]
    left_out.update(unread(file.path) for file in set(found) - set(data))
    data = _with_lines(data, left_out)
    kinds = sorted({split_ending(file.path)[1].removeprefix(".") for file in data})
    if len(kinds) > 1:
        raise InputError(
            f"data.sources.{name}: {source.path} holds {' and '.join(kinds)} files, which may say the same twice; name "
            f"one kind in path, by a glob that ends in *.{kinds[-1]}*"
        )
    return data


def _saved_files(state: str) -> set[str] | None:
    """The files that `datasets` saved with its state file; None where that file is something else."""
    with local_copy(state) as local:
        fields = read_json(local)
    if not isinstance(fields, dict) or "_data_files" not in fields:
        return None
    return {state.removesuffix("state.json") + entry["filename"] for entry in fields["_data_files"]}
