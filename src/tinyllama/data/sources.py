"""Which files a source has, in which split, and their rows.

Files come sorted by path, so no listing order matters. What the recipe names must be there and no file may be read
twice: both are checked here, before any work is done.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow

from tinyllama.data.inputs import Found, fetched, find_files, identity, opened, reason_of
from tinyllama.data.rows import Reject, Row, language_of, rows_of, text_field
from tinyllama.data.tables import parquet_columns
from tinyllama.errors import InputError
from tinyllama.files import read_json
from tinyllama.recipe_data import SLIMPAJAMA_SUBSETS, Source
from tinyllama.recipe_errors import nearest

__all__ = ["InputFile", "Reject", "Row", "list_files", "read_rows", "refuse_overlap"]

_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_SUFFIXES = {
    "slimpajama": (*_LINES, ".parquet"),
    "starcoderdata": (".parquet",),
    "jsonl": _LINES,
    "parquet": (".parquet",),
    "text": (".txt",),
    "csv": (".csv",),
    "huggingface": (".parquet", *_LINES, ".json", ".csv", ".arrow"),
}
# The hub's words for a split, as in datasets/data_files.py, and the names there of files that are about the data.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_ABOUT = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


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
    """Every file of a source, sorted by path; those of other subsets and of a test split are counted in `left_out`.

    Raises InputError where there is none, one cannot be read or would be read twice, a folder that the recipe names
    is not there, or a folder of Starcoderdata has other columns.
    """
    suffixes = _SUFFIXES[source.format]
    found = find_files(source.path, lambda file: file.endswith(suffixes))
    if source.format == "starcoderdata":
        found = _languages(name, source, found, left_out)
    elif source.format == "huggingface":
        found = _data_files(name, source, found)
    placed = [InputFile(file.path, _split(file, source), file.size) for file in found]
    files = [file for file in placed if file.split != "test"]
    if left_out is not None and len(files) < len(placed):
        left_out["test split"] += len(placed) - len(files)
    if not files:
        wanted = " or ".join(suffixes)
        rest = ", but for a test split or what is excluded" if found else ""
        raise InputError(
            f"data.sources.{name}: no {wanted} file under {source.path}{rest}; correct path, or put the data there"
        )
    _refuse_twice(name, files)
    return files


def read_rows(path: str, source: Source, local: Path | None = None) -> Iterator[Row | Reject]:
    """Every row of a file, used or not; `local` is its copy where it was fetched already.

    Raises InputError where the file cannot be read to its end.
    """
    if local is None:
        with fetched(path) as copy:
            yield from read_rows(path, source, copy)
        return
    try:
        yield from rows_of(local, path, source)
    except (OSError, EOFError, UnicodeDecodeError, pyarrow.ArrowException, csv.Error) as error:
        raise InputError(
            f"{path}: cannot be read to its end ({reason_of(error)}); fetch it again or take it out"
        ) from None


def refuse_overlap(sources: Mapping[str, Source], files: Mapping[str, Sequence[InputFile]]) -> None:
    """Raise InputError where two sources read the same file, unless SlimPajama's subsets keep their rows apart."""
    readers: dict[str, list[str]] = {}
    for name, own in files.items():
        for file in own:
            others = readers.setdefault(identity(file.path), [])
            for other in others:
                if not _apart(sources[name], sources[other]):
                    raise InputError(
                        f"data.sources.{name}: {file.path} is read by {other} too; take it out of one of the two"
                    )
            others.append(name)


def _apart(one: Source, other: Source) -> bool:
    """Whether two sources that read the same files take no row in common."""
    if not one.format == other.format == "slimpajama" or not (one.include or other.include):
        return False  # rows of a subset unknown to us belong to every source that only excludes
    return not _chosen(one) & _chosen(other)


def _chosen(source: Source) -> set[str]:
    return set(source.include or SLIMPAJAMA_SUBSETS) - set(source.exclude)


def _split(file: Found, source: Source) -> str:
    """The split that a file's folders and name put it in, by the hub's rule: the first word that names one counts."""
    if source.format in ("slimpajama", "huggingface"):
        for part in file.parts:
            for word in re.split(r"[-._ 0-9]+", part.lower()):
                if split := _SPLITS.get(word):
                    return split
    return "train"


def _refuse_twice(name: str, files: list[InputFile]) -> None:
    first: dict[str, str] = {}
    for file in files:
        other = first.setdefault(identity(file.path), file.path)
        if other != file.path:
            raise InputError(
                f"data.sources.{name}: {other} and {file.path} are one file, which would count twice; remove the link"
            )


def _languages(name: str, source: Source, found: list[Found], left_out: Counter[str] | None) -> list[Found]:
    """The files of the languages that the recipe chooses; the first of each must have the column that is read."""
    folders: dict[str, list[Found]] = {}
    for file in found:
        folders.setdefault(language_of(file.path), []).append(file)
    for choice in ("include", "exclude"):
        for folder in getattr(source, choice):
            if folder not in folders:
                raise InputError(
                    f"data.sources.{name}.{choice}: {folder!r} is no folder of {source.path}; "
                    f"{nearest(folder, sorted(folders))}"
                )
    chosen = {folder for folder in source.include or folders if folder not in source.exclude}
    if left_out is not None:
        left_out.update({f"excluded: {folder}": len(folders[folder]) for folder in folders.keys() - chosen})
    _check_columns(name, {folder: folders[folder][0] for folder in sorted(chosen)}, text_field(source))
    return [file for file in found if language_of(file.path) in chosen]


def _check_columns(name: str, files: dict[str, Found], column: str) -> None:
    """Raise InputError with every folder whose file lacks the column, and what it has instead."""
    lacking = {}
    for folder, file in files.items():
        try:
            with opened(file.path) as content:
                present = parquet_columns(content)
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise InputError(
                f"{file.path}: cannot be read ({reason_of(error)}); fetch it again or take it out"
            ) from None
        if column not in present:
            lacking[folder] = ", ".join(present)
    if lacking:
        which = "; ".join(f"{folder} (it has {columns})" for folder, columns in lacking.items())
        raise InputError(
            f"data.sources.{name}: no column {column!r} in {which}; exclude {', '.join(lacking)}, or give each a "
            f"source of its own with include: [{next(iter(lacking))}] and text: COLUMN"
        )


def _data_files(name: str, source: Source, found: list[Found]) -> list[Found]:
    """The files of a data set's folder that hold its rows: of what `datasets` saved, those that its state names."""
    data = [file for file in found if Path(file.path).name not in _ABOUT or not file.parts]
    for state in [file for file in data if Path(file.path).name == "state.json"]:
        if (named := _saved_files(state.path)) is None:
            continue
        if missing := sorted(named - {file.path for file in data}):
            raise InputError(f"{missing[0]}: is not there, but {state.path} names it; save the data set again")
        folder = state.path.removesuffix("state.json")
        # Beside the saved files lie caches of what was once computed from them.
        data = [file for file in data if not file.path.startswith(folder) or file.path in named]
    kinds = sorted({re.sub(r"\.jsonl\.(gz|zst)$", ".jsonl", file.path).rsplit(".", 1)[-1] for file in data})
    if len(kinds) > 1:
        raise InputError(
            f"data.sources.{name}: {source.path} holds {' and '.join(kinds)} files, which may say the same twice; name "
            f"one kind in path, by a glob such as {source.path.rstrip('/')}/**/*.{kinds[0]}*"
        )
    return data


def _saved_files(state: str) -> set[str] | None:
    """The files that `datasets` saved with its state file; None where that file is something else."""
    with fetched(state) as local:
        fields = read_json(local)
    if not isinstance(fields, dict) or "_data_files" not in fields:
        return None
    return {state.removesuffix("state.json") + entry["filename"] for entry in fields["_data_files"]}
