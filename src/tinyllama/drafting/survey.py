"""Survey of folders and files: which files contain text, in which format and field, and how much text.

The survey reads the beginning of each file with the readers of `prepare`, so an ending alone decides nothing. Sizes of
compressed files and of rows are estimated from these beginnings. In a folder with many files of rows, such as parquet
files, a few of them represent the others.
"""

import codecs
import csv
import lzma
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet

from tinyllama.drafting.file_names import JSON_ENDINGS, NOT_PROSE, ROW_ENDINGS, is_known_code
from tinyllama.errors import InputError, first_line
from tinyllama.files import MAX_POINTER_BYTES, read_json
from tinyllama.formatting import visible
from tinyllama.prepare.columnar import arrow_columns, parquet_columns
from tinyllama.prepare.files import canonical_path, is_output, iter_folder
from tinyllama.prepare.json_lines import parse_line
from tinyllama.prepare.readers import SourceRow, read_rows
from tinyllama.prepare.sources import OUTPUT, check_no_pointer, compression_of, list_files, skip_reason, split_suffixes
from tinyllama.prepare.streams import CHUNK_BYTES, READ_ERRORS, RawFile, iter_chunks, iter_lines, open_text
from tinyllama.progress import Bar
from tinyllama.recipe import Source
from tinyllama.recipe.loading import printable
from tinyllama.text import TextLike, to_str

Format = Literal["text", "jsonl", "parquet", "csv", "huggingface"]
_HEAD_BYTES = 1 << 16
_PACKED_BYTES = 1 << 18  # compressed again to estimate a ratio
_MAX_LINE_CHARACTERS = 200  # mean length of lines of code; generated code has longer ones
_SAMPLE_ROWS = 32
_MAX_ENDINGS = 6  # per line about skipped files
_MAX_COLUMNS = 50
_MAX_READ_PER_FOLDER = 32
_MAX_RATIO: int = Source.model_fields["max_compression_ratio"].default
_MIN_TEXT_CHARACTERS = 16  # mean length of the values of a text field
_MAX_WORD_CHARACTERS = 40  # mean length of words in text; encoded data has longer ones
_EXAMPLE_CHARACTERS = 40
_MAX_OTHER_FIELDS = 5


@dataclass(frozen=True)
class FoundFile:
    """A file with text."""

    path: str
    format: Format
    size: int
    """Size in bytes."""
    text_bytes: float
    """Size of its text in bytes, estimated for compressed files and rows."""
    num_documents: float
    """Number of documents, estimated like `text_bytes`."""
    field: str | None = None
    """Field or column with the text; None for the format `text`."""
    other_fields: tuple[str, ...] = ()
    """Other fields or columns with text, at most _MAX_OTHER_FIELDS."""
    example: str = ""
    """Beginning of its text, on one line."""
    is_code: bool = False
    saved_dataset: str | None = None
    """Folder of the data set of the library `datasets` that the file belongs to."""


@dataclass(frozen=True)
class SkippedFile:
    """A file that is not used."""

    path: str
    reason: str
    is_refused: bool = False
    """Whether `prepare` would stop at this file; otherwise it would only reject the file's rows."""


@dataclass
class Survey:
    """Result of a survey of one folder, or of files in one folder."""

    root: str
    """Folder as the user named it."""
    is_folder: bool
    """Whether the user named the folder, not files in it."""
    found: list[FoundFile]
    skipped: list[SkippedFile]


def survey(paths: Sequence[str], recipe: Path) -> list[Survey]:
    """Look at folders and files; files in one folder are surveyed together.

    A folder that contains the file `recipe`, which `init` writes, is surveyed without files of the same ending.
    Otherwise, a change of the recipe would change the text. Raises InputError if a path does not exist, if a folder
    cannot be read, or if a link leads back to its own folder.
    """
    named: dict[tuple[str, bool], list[str]] = defaultdict(list)
    folders = {Path(path).resolve() for path in paths if Path(path).is_dir()}
    for given in {Path(path).resolve(): str(Path(path)) for path in paths}.values():
        if not folders.isdisjoint(Path(given).resolve().parents):
            continue  # in another given folder
        if Path(given).is_dir():
            root = "" if given == "." else given
            named[root, True] = sorted(iter_folder(root))
        elif Path(given).is_file():
            parent = str(Path(given).parent)
            named["" if parent == "." else parent, False].append(given)
        else:
            raise InputError(f"{given}: no such file or folder; give folders or files with text")
    return [_survey(root, is_folder, files, recipe) for (root, is_folder), files in named.items()]


def skipped_lines(skipped: Sequence[SkippedFile]) -> Iterator[str]:
    """Yield one line per reason, with the number of files per ending, the most frequent first, and one file."""
    by_reason: dict[str, Counter[str]] = defaultdict(Counter)
    for file in skipped:
        by_reason[file.reason][skip_reason(file.path).removeprefix("ending ")] += 1
    for reason, endings in sorted(by_reason.items(), key=lambda item: -item[1].total()):
        listed = [f"{count:,} {ending}" for ending, count in endings.most_common(_MAX_ENDINGS)]
        more = endings.total() - sum(count for _, count in endings.most_common(_MAX_ENDINGS))
        example = next(file.path for file in skipped if file.reason == reason)
        yield f"{reason}: {', '.join([*listed, *([f'{more:,} others'] if more else [])])} ({printable(example)})"


def _survey(root: str, is_folder: bool, paths: Sequence[str], recipe: Path) -> Survey:
    folders = _saved_datasets(paths)
    files = [file for folder in folders for file in _survey_dataset(folder)]
    rest = [path for path in paths if not _is_in(path, folders)]
    has_recipe, is_in_output = is_folder and recipe.resolve().is_relative_to(Path(root).resolve()), is_output(root)
    representatives, seen = _representatives(rest), dict[str, FoundFile | SkippedFile]()
    with Bar("looking at the files", len(rest), "files") as bar:
        for number, path in enumerate(rest, 1):
            real = canonical_path(path)
            found: FoundFile | SkippedFile
            if is_output(path) and not is_in_output:
                found = SkippedFile(path, OUTPUT)
            elif has_recipe and split_suffixes(path)[1] == recipe.suffix.lower():
                found = SkippedFile(path, "ending of the recipe, which is in this folder")
            elif real in seen:
                is_other_kind = is_known_code(path) != is_known_code(seen[real].path)  # in another source
                found = SkippedFile(path, "link to another file", is_refused=is_other_kind)
            elif isinstance(model := seen.get(representatives.get(path, "")), FoundFile):
                found = _scale_to(model, path)
            else:
                found = survey_file(path)
            seen[real] = seen[path] = found
            files.append(found)
            bar.show(number)
    skipped = [file for file in files if isinstance(file, SkippedFile)]
    return Survey(root, is_folder, [file for file in files if isinstance(file, FoundFile)], skipped)


def _representatives(paths: Sequence[str]) -> dict[str, str]:
    """Return the representative, in the same folder and with the same ending, of each file that is not read."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in paths:
        if (suffix := split_suffixes(path)[1]) in ROW_ENDINGS:
            groups[str(Path(path).parent), suffix].append(path)
    others: dict[str, str] = {}
    for group in groups.values():
        step = -(-len(group) // _MAX_READ_PER_FOLDER)
        others |= {path: group[place - place % step] for place, path in enumerate(group) if place % step}
    return others


def _scale_to(model: FoundFile, path: str) -> FoundFile:
    """Return the description of a file that is like `model`, in proportion to its size."""
    size = Path(path).stat().st_size
    scale = size / max(1, model.size)
    return replace(
        model, path=path, size=size, text_bytes=model.text_bytes * scale, num_documents=model.num_documents * scale
    )


def survey_file(path: str) -> FoundFile | SkippedFile:
    """Read the beginning of a file, and return what the file contains or why it is not used."""
    if not Path(path).is_file():
        return SkippedFile(path, "broken link" if Path(path).is_symlink() else "not a regular file", is_refused=True)
    if not _is_allowed(path):
        return SkippedFile(path, "control characters in its path, or not UTF-8", is_refused=not path.isascii())
    try:
        return _survey_content(path)
    except InputError as error:
        return SkippedFile(path, _short_reason(path, error), is_refused=True)
    except (*READ_ERRORS, csv.Error) as error:
        return SkippedFile(path, f"cannot be read ({first_line(error)})", is_refused=True)


def _is_allowed(name: str) -> bool:
    """Return whether a recipe may contain a path or the name of a field."""
    return visible(name) == name and not set(name) & {"\n", "\t"}


def _survey_content(path: str) -> FoundFile | SkippedFile:
    file = Path(path)
    if not (size := file.stat().st_size):
        return SkippedFile(path, "empty", is_refused=compression_of(path) is not None)
    with file.open("rb") as raw:
        head = raw.read(MAX_POINTER_BYTES)
    check_no_pointer(path, head)
    if head.startswith(b"PAR1"):
        return _survey_columns(path, "parquet", size, parquet_columns(file))
    is_arrow = split_suffixes(path)[1] == ".arrow"
    return _survey_columns(path, "huggingface", size, arrow_columns(file)) if is_arrow else _survey_text(path, size)


def _short_reason(path: str, error: InputError) -> str:
    return str(error).removeprefix(f"{path}: ").split(";")[0]


def _survey_text(path: str, size: int) -> FoundFile | SkippedFile:
    file, suffix = RawFile(Path(path), path, compression_of(path), _MAX_RATIO), split_suffixes(path)[1]
    chunk = next(iter_chunks(file), b"")
    text, is_code = decoded_beginning(chunk[:_HEAD_BYTES], len(chunk) <= _HEAD_BYTES), is_known_code(path)
    if text is None:
        return SkippedFile(path, "binary, or not UTF-8")
    reason = NOT_PROSE.get(suffix)
    if not text.strip():
        reason = "empty"
    elif is_code and len(text) > _MAX_LINE_CHARACTERS * (text.count("\n") + 1):
        reason = "code with long lines, probably generated"
    if reason:
        return SkippedFile(path, reason)
    num_bytes = decompressed_size(chunk, size, file.compression)
    if suffix == ".csv":
        with open_text(file) as lines:
            header = next(csv.reader(lines), [])
        if len(header) == 1 and (separator := next((one for one in ";\t|" if one in header[0]), None)):
            return SkippedFile(path, f"columns are separated by {separator!r} instead of commas", is_refused=True)
        return _survey_columns(path, "csv", num_bytes, header)
    rows = _survey_lines(file, suffix, num_bytes) if suffix in JSON_ENDINGS or text.startswith("{") else None
    if rows is None and suffix in JSON_ENDINGS:
        return SkippedFile(path, "JSON without a field of text in each line; lists and objects are not text")
    return rows or FoundFile(path, "text", size, num_bytes, 1, None, (), one_line(text), is_code)


def decoded_beginning(data: bytes, is_complete: bool) -> str | None:
    """Return the text of a file's first bytes, which may end within a character; None if they are not UTF-8 text."""
    if b"\0" in data:
        return None
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, is_complete)
    except UnicodeDecodeError:
        return None


def decompressed_size(chunk: bytes, size: int, compression: str | None) -> float:
    """Return a file's size after decompression, estimated from its first chunk if the file has more than one."""
    if compression is None or len(chunk) < CHUNK_BYTES:
        return len(chunk) if compression else size
    head = chunk[:_PACKED_BYTES]
    packed = lzma.compress(head) if compression == "xz" else pyarrow.compress(head, compression, asbytes=True)
    return max(len(chunk), len(head) * size / len(packed))


def _survey_lines(file: RawFile, suffix: str, num_bytes: float) -> FoundFile | None:
    """Look at the first lines of a file; return None unless they are JSON objects with a field of text.

    With another ending than those of JSON lines, every line must be an object.
    """
    samples: dict[str, list[str]] = defaultdict(list)
    line_bytes = num_rows = 0
    for number, line in islice(iter_lines(file), _SAMPLE_ROWS):
        try:
            fields = parse_line(file.name, (number, line))[1]
        except InputError:  # an object over several lines
            return None
        if isinstance(fields, str):
            if suffix not in JSON_ENDINGS:
                return None
            continue
        line_bytes, num_rows = line_bytes + len(line or b""), num_rows + 1
        for name, value in fields.items():
            if isinstance(value, TextLike) and _is_allowed(name):
                samples[name].append(to_str(value))
    if not (names := text_fields(samples)):
        return None
    chosen, others = names[0], tuple(names[1 : 1 + _MAX_OTHER_FIELDS])
    share = sum(len(text.encode()) for text in samples[chosen]) / line_bytes
    documents, size = num_bytes * num_rows / line_bytes, file.local.stat().st_size
    text_bytes, example = num_bytes * share, one_line(samples[chosen][0])
    return FoundFile(file.name, "jsonl", size, text_bytes, documents, chosen, others, example)


def _survey_columns(path: str, format: Format, num_bytes: float, columns: Sequence[str]) -> FoundFile | SkippedFile:
    """Look at the first rows of a file with columns; `num_bytes` is its size after decompression."""
    samples: dict[str, list[str]] = {}
    problem = None
    for column in filter(_is_allowed, columns[:_MAX_COLUMNS]):
        rows = read_rows(path, Source(format=format, path=path, weight=1, text=column))
        try:
            samples[column] = [to_str(row.text) for row in islice(rows, _SAMPLE_ROWS) if isinstance(row, SourceRow)]
        except InputError as error:  # a column of lists, or a file with another separator
            problem = _short_reason(path, error)
    if not (names := text_fields(samples)):
        return SkippedFile(path, problem or "no column of text")
    name, others = names[0], tuple(names[1 : 1 + _MAX_OTHER_FIELDS])
    texts = [text.encode() for text in samples[name]]
    mean = sum(map(len, texts)) / len(texts)
    if format == "parquet":
        documents = float(pyarrow.parquet.read_metadata(path).num_rows)
    else:
        separators = len(texts) * len(columns)
        all_bytes = separators + sum(len(text.encode()) for values in samples.values() for text in values)
        documents = num_bytes * len(texts) / all_bytes
    size = Path(path).stat().st_size
    return FoundFile(path, format, size, documents * mean, documents, name, others, one_line(samples[name][0]))


def text_fields(samples: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the fields with text, those with the most text first; `text` is first if it has at least half as much.

    Fields whose values look like numbers, dates, identifiers or encoded data are not text.
    """
    sizes = {name: sum(map(len, values)) for name, values in samples.items() if values and _is_prose(values)}
    half = max(sizes.values(), default=0) / 2
    return sorted(sizes, key=lambda name: (name != "text" or sizes[name] < half, -sizes[name]))


def _is_prose(values: Sequence[str]) -> bool:
    """Return whether values are long enough, have letters, and, for ASCII, have spaces between words."""
    joined = "".join(values)[:_HEAD_BYTES]
    letters, spaces = sum(map(str.isalpha, joined)), sum(map(str.isspace, joined))
    is_spaced = not joined.isascii() or spaces * _MAX_WORD_CHARACTERS >= len(joined)
    return len(joined) >= _MIN_TEXT_CHARACTERS * len(values) and letters >= 0.4 * len(joined) and is_spaced


def one_line(text: str) -> str:
    """Return the beginning of a text as one line without repeated spaces."""
    line = " ".join(text[:400].split())
    return line if len(line) <= _EXAMPLE_CHARACTERS else f"{line[: _EXAMPLE_CHARACTERS - 1]}…"


def _saved_datasets(paths: Sequence[str]) -> list[str]:
    """Return the folders that the library `datasets` saved, without the folders inside of them."""
    folders = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name == "dataset_dict.json" or (name == "state.json" and "_data_files" in _fields(path)):
            folders.append(folder or ".")
    return [one for one in folders if not _is_in(one, [other for other in folders if other != one])]


def _is_in(path: str, folders: Sequence[str]) -> bool:
    """Return whether a relative or absolute path is in one of the folders."""
    return "." in folders or any(path.startswith(f"{folder}/") for folder in folders)


def _fields(path: str) -> Mapping[str, object]:
    with suppress(InputError, OSError):
        if isinstance(fields := read_json(Path(path)), dict):
            return fields
    return {}


def _survey_dataset(folder: str) -> Sequence[FoundFile | SkippedFile]:
    """Look at the files of a saved data set; if one is not usable, none is. Raises InputError if one is missing."""
    files = list_files(Path(folder).name, Source(format="huggingface", path=folder, weight=1))
    found = [survey_file(file.path) for file in files]
    if problem := next((one for one in found if isinstance(one, SkippedFile)), None):
        return [replace(problem, path=file.path, is_refused=True) for file in files]
    return [replace(one, saved_dataset=folder) for one in found if isinstance(one, FoundFile)]
