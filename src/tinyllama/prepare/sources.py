"""Listing of a source's files, with the kind and the split of each file.

Files are sorted by path, so the order in which a file system lists them has no effect. Before any work starts, this
module checks that the recipe's files exist and that no file is read twice. Skipped files are counted by suffix.
"""

import codecs
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import pyarrow

from tinyllama.errors import InputError
from tinyllama.files import MAX_POINTER_BYTES, git_pointer, read_json
from tinyllama.prepare.columnar import parquet_columns
from tinyllama.prepare.files import (
    FileEntry,
    canonical_path,
    find_files,
    is_output,
    local_copy,
    open_input,
    translate_read_errors,
)
from tinyllama.prepare.json_lines import begins_multiline_json
from tinyllama.prepare.streams import READ_ERRORS, decompress
from tinyllama.recipe import SLIMPAJAMA_SUBSETS, Source
from tinyllama.recipe.loading import printable, suggest

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
"""Name of each supported compression of JSON lines, text and csv files, by suffix."""
_KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonlines": "lines",
    ".json": "lines",
    ".txt": "text",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Kind of file by suffix."""
_COMPRESSIBLE_KINDS = ("lines", "text", "csv")
_FORMAT_KINDS = {
    "slimpajama": ("lines", "parquet"),
    "starcoderdata": ("parquet",),
    "jsonl": ("lines",),
    "parquet": ("parquet",),
    "text": ("text",),
    "csv": ("csv",),
    "huggingface": ("lines", "parquet", "csv", "arrow"),
}
"""Kinds of files that each format reads."""
OUTPUT = "output of tinyllama"
"""Reason to skip a file in the folder `runs` of the working directory."""
_LINK = "link to another file of the source"
_WITHOUT_JSON_LINES = "ending .json without one JSON object per line"
_HEAD_BYTES = 1 << 16
_MAX_NAMED_REASONS = 5  # in an error message
# Words in paths that the library `datasets` assigns to a split (data_files.py), and names of files that describe a
# data set.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_METADATA_FILES = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


@dataclass(frozen=True)
class InputFile:
    """A raw file and its split."""

    path: str
    """Local path or URL."""
    split: str
    """`train` or `validation`."""
    size: int
    """Size in bytes."""


def text_field(source: Source) -> str:
    """Return the name of the field or column that contains a source's documents."""
    return source.text or ("content" if source.format == "starcoderdata" else "text")


def url_field(source: Source) -> str | None:
    """Return the name of the field or column that contains the URLs of a source's documents, if cleaning needs URLs."""
    return (source.url or "url") if source.clean.url_block_lists else None


def language_of(path: str) -> str:
    """Return Starcoderdata's name for the language of a file, which is the name of the file's folder."""
    return Path(path).parent.name


def split_suffixes(name: str) -> tuple[str, str, str]:
    """Return a file name's stem, suffix and compression suffix; suffixes are in lower case, or `""` if missing."""
    stem, compression = _split_last_suffix(name)
    if compression not in COMPRESSIONS:
        return stem, compression, ""
    stem, suffix = _split_last_suffix(stem)
    return stem, suffix, compression


def _split_last_suffix(name: str) -> tuple[str, str]:
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix), suffix.lower()


def compression_of(name: str) -> str | None:
    """Return the compression that a file's name declares, or None."""
    return COMPRESSIONS.get(_split_last_suffix(name)[1])


def file_kind(name: str, format: str) -> str:
    """Return a file's kind: the format's only kind, or else the kind of the suffix (`lines` for an unknown suffix)."""
    kinds = _FORMAT_KINDS[format]
    return kinds[0] if len(kinds) == 1 else _KINDS.get(split_suffixes(name)[1], "lines")


def is_read(name: str, format: str) -> bool:
    """Return whether a source of this format includes a file with this name when its folder is searched."""
    _, suffix, compression = split_suffixes(name)
    kind = _KINDS.get(suffix)
    return kind in _FORMAT_KINDS[format] and (not compression or kind in _COMPRESSIBLE_KINDS)


def skip_reason(name: str) -> str:
    """Return why a file is skipped, such as `ending .md` or `ending .jsonl.lz4`; a number is not an ending."""
    stem, last = _split_last_suffix(name)
    _, before = _split_last_suffix(stem)
    if not last or last[1:].isdigit():
        return "no ending"
    is_double = before[1:].isalpha() and (last in COMPRESSIONS or before in _KINDS)
    return f"ending {printable(before + last if is_double else last)}"


def list_files(name: str, source: Source, skipped: Counter[str] | None = None) -> list[InputFile]:
    """Return a source's files, sorted by path; count the other files in the source's folders in `skipped`, by reason.

    A folder is searched for files with the endings of the source's format. A file that `path` names, or for text a file
    that a glob matches, is read whatever its ending. Files in the folder `runs` of the working directory are skipped
    unless `path` is in this folder: training would change the files of a source. Raises InputError if there is no file,
    if a file cannot be read, or if two files have the same text. Raises InputError also if `include` or `exclude` names
    a missing folder, or if a folder of Starcoderdata lacks the text column.
    """
    skipped = Counter() if skipped is None else skipped
    other_paths: list[str] = []
    is_text = source.format == "text"
    found = find_files(source.path, lambda file: is_read(file, source.format), other_paths, takes_named=is_text)
    skipped.update(map(skip_reason, other_paths))
    if not is_output(source.path):
        inputs = [file for file in found if not is_output(file.path)]
        skipped.update([OUTPUT] * (len(found) - len(inputs)))
        found = inputs
    if source.format == "starcoderdata":
        found = _select_languages(name, source, found, skipped)
    elif source.format == "huggingface":
        found = _select_data_files(name, source, found, skipped)
    else:
        found = _select_json_lines(found, skipped)
    with_splits = [InputFile(file.path, _split_of(file, source), file.size) for file in found]
    by_path: dict[str, InputFile] = {}
    for file in with_splits:
        if file.split != "test" and by_path.setdefault(canonical_path(file.path), file) is not file:
            skipped[_LINK] += 1
    files = list(by_path.values())
    skipped.update(["test split"] * sum(file.split == "test" for file in with_splits))
    if not files:
        raise _no_files_error(name, source, skipped)
    _check_no_copies(name, source.format, files)
    return files


def _no_files_error(name: str, source: Source, skipped: Counter[str]) -> InputError:
    kinds, is_text = _FORMAT_KINDS[source.format], source.format == "text"
    wanted = " or ".join(suffix for suffix, kind in _KINDS.items() if kind in kinds) + " file"
    if is_text and not skipped:
        wanted = "file"
    elif set(kinds) & set(_COMPRESSIBLE_KINDS):
        wanted += f" (compressed: {' or '.join(COMPRESSIONS)})"
    remedy = "correct the source's path, format, include or exclude, or add the data"
    if _WITHOUT_JSON_LINES in skipped:
        remedy = "convert the files: one JSON object per line is expected"
    elif is_text and (ending := _most_common_ending(skipped)):
        remedy = f"to read files with another ending, give a glob, such as {source.path.rstrip('/')}/**/*{ending}"
    counts = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common(_MAX_NAMED_REASONS))
    others = f" (files not read: {counts})" if counts else ""
    return InputError(f"data.sources.{name}: no {wanted} under {source.path}{others}; {remedy}")


def _most_common_ending(skipped: Counter[str]) -> str | None:
    """Return the ending of most skipped files, from the reasons of `skip_reason`; None if they have no ending."""
    endings = (reason.removeprefix("ending ") for reason, _ in skipped.most_common() if reason.startswith("ending "))
    return next(endings, None)


def check_no_pointer(path: str, content: bytes) -> None:
    """Raise InputError if the content of a file is a pointer of git-lfs or git-annex instead of data."""
    if pointer := git_pointer(content):
        tool, command = pointer
        raise InputError(
            f"{path}: a {tool} pointer, not the data itself; run `{command}` in its repository, then rerun"
        )


def check_sources_disjoint(sources: Mapping[str, Source], files: Mapping[str, Sequence[InputFile]]) -> None:
    """Raise InputError if two sources read the same file, unless both read different subsets of SlimPajama."""
    readers: dict[str, list[str]] = {}
    for name, source_files in files.items():
        for file in source_files:
            others = readers.setdefault(canonical_path(file.path), [])
            for other in others:
                if not _are_disjoint(sources[name], sources[other]):
                    raise InputError(
                        f"data.sources.{name}: {file.path} is read by {other} too; remove it from one source"
                    )
            others.append(name)


def _are_disjoint(first: Source, second: Source) -> bool:
    """Return whether two sources that read the same files use different rows."""
    if not first.format == second.format == "slimpajama" or not (first.include or second.include):
        return False  # a row of an unknown subset belongs to every source that only excludes subsets
    subsets = [set(source.include or SLIMPAJAMA_SUBSETS) - set(source.exclude) for source in (first, second)]
    return subsets[0].isdisjoint(subsets[1])


def _split_of(file: FileEntry, source: Source) -> str:
    """Return the split of a file by the hub's rule: the first split word in its folders and name decides."""
    if source.format in ("slimpajama", "huggingface"):
        for part in file.parts:
            for word in re.split(r"[-._ 0-9]+", part.lower()):
                if split := _SPLITS.get(word):
                    return split
    return "train"


def _check_no_copies(name: str, format: str, files: list[InputFile]) -> None:
    """Raise InputError if two files have the same text and the same name, such as a.jsonl and a.jsonl.gz.

    For text, only the compression may differ between such names: a.c and a.h are two files.
    """
    by_stem: dict[str, str] = {}
    for file in files:
        stem, suffix, _ = split_suffixes(file.path)
        other = by_stem.setdefault(stem + suffix if format == "text" else stem, file.path)
        if other != file.path and _read_head(file.path) == _read_head(other):
            raise InputError(
                f"data.sources.{name}: {other} and {file.path} begin with the same text, which would be read twice; "
                "remove one, or select one kind of files with a glob"
            )


def _read_head(path: str) -> bytes:
    """Return the first decompressed bytes of a file, or its name if reading fails; a later read reports the error."""
    try:
        with open_input(path) as file:
            chunks = decompress(pyarrow.PythonFile(file), compression_of(path))
            return b"".join(islice(chunks, 1))[:_HEAD_BYTES]
    except READ_ERRORS:
        return path.encode(errors="replace")


def _select_json_lines(found: list[FileEntry], skipped: Counter[str]) -> list[FileEntry]:
    """Return the files, except .json files without one object per line, such as metadata."""
    kept = [
        file
        for file in found
        if not file.parts or split_suffixes(file.path)[1:] != (".json", "") or _has_json_lines(file)
    ]
    skipped.update([_WITHOUT_JSON_LINES] * (len(found) - len(kept)))
    return kept


def _has_json_lines(file: FileEntry) -> bool:
    if Path(file.path).name in _METADATA_FILES:
        return False
    head = _read_head(file.path).removeprefix(codecs.BOM_UTF8).lstrip()
    if file.size <= MAX_POINTER_BYTES:
        check_no_pointer(file.path, head)
    line, end, _ = head.partition(b"\n")
    return not head or (line[:1] == b"{" and not (end and begins_multiline_json(line)))


def _select_languages(name: str, source: Source, found: list[FileEntry], skipped: Counter[str]) -> list[FileEntry]:
    """Return the files of the selected languages; each language's first file must have the source's text column."""
    folders: dict[str, list[FileEntry]] = {}
    for file in found:
        folders.setdefault(language_of(file.path), []).append(file)
    for choice in ("include", "exclude"):
        for folder in getattr(source, choice):
            if folder not in folders:
                remedy = suggest(folder, sorted(folders))
                raise InputError(f"data.sources.{name}.{choice}: {folder!r} is not a folder of {source.path}; {remedy}")
    chosen = {folder for folder in source.include or folders if folder not in source.exclude}
    skipped.update({f"excluded: {folder}": len(folders[folder]) for folder in folders.keys() - chosen})
    _check_text_column(name, {folder: folders[folder][0] for folder in sorted(chosen)}, text_field(source))
    return [file for file in found if language_of(file.path) in chosen]


def _check_text_column(name: str, files: dict[str, FileEntry], column: str) -> None:
    """Check that all `files`, one per folder, have a column.

    The InputError names the folders whose file lacks the column, and the columns that these files have.
    """
    lacking = {}
    for folder, file in files.items():
        with translate_read_errors(file.path, READ_ERRORS), open_input(file.path) as content:
            if file.size <= MAX_POINTER_BYTES:
                check_no_pointer(file.path, content.read())
            present = parquet_columns(content)
        if column not in present:
            lacking[folder] = ", ".join(present)
    if lacking:
        folders = "; ".join(f"{folder} (it has {columns})" for folder, columns in lacking.items())
        raise InputError(
            f"data.sources.{name}: no column {column!r} in {folders}; exclude {', '.join(lacking)}, or read each in a "
            f"separate source with include: [{next(iter(lacking))}] and text: COLUMN"
        )


def _select_data_files(name: str, source: Source, found: list[FileEntry], skipped: Counter[str]) -> list[FileEntry]:
    """Return the files with the rows of a data set: if `datasets` saved the folder, the files that state.json lists."""
    data = found
    for state in [file for file in data if Path(file.path).name == "state.json"]:
        if (saved := _saved_files(state.path)) is None:
            continue
        if missing := sorted(saved - {file.path for file in data}):
            raise InputError(f"{missing[0]}: missing, but {state.path} lists it; save the data set again")
        folder = state.path.removesuffix("state.json")
        # The folder may also contain cached files of data sets that were computed from this data set.
        data = [file for file in data if not file.path.startswith(folder) or file.path in saved]
    skipped.update(skip_reason(file.path) for file in set(found) - set(data))
    data = _select_json_lines(data, skipped)
    suffixes = sorted({split_suffixes(file.path)[1].removeprefix(".") for file in data})
    if len(suffixes) > 1:
        raise InputError(
            f"data.sources.{name}: {source.path} contains {' and '.join(suffixes)} files, possibly with the same rows; "
            f"select one kind in path with a glob that ends in *.{suffixes[-1]}*"
        )
    return data


def _saved_files(state: str) -> set[str] | None:
    """Return the files that a state file of `datasets` lists; None if the file is not a state file."""
    with local_copy(state) as local:
        fields = read_json(local)
    if not isinstance(fields, dict) or "_data_files" not in fields:
        return None
    with translate_read_errors(state):
        return {state.removesuffix("state.json") + entry["filename"] for entry in fields["_data_files"]}
