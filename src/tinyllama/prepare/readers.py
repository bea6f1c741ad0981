"""Reader of the rows of raw files: SlimPajama, Starcoderdata, jsonl, parquet, arrow, text and csv.

An unusable row becomes a `RejectedRow` with a reason. A file that cannot be read to its end causes an error with the
name of the file. Every format is first converted to rows of fields, so that one function decides which rows are usable.
"""

import ast
import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from io import TextIOBase
from itertools import count
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError
from tinyllama.files import MAX_POINTER_BYTES
from tinyllama.prepare.columnar import (
    UnusableValue,
    arrow_columns,
    arrow_rows,
    decode_utf8,
    parquet_columns,
    parquet_rows,
)
from tinyllama.prepare.files import local_copy, translate_read_errors
from tinyllama.prepare.json_lines import RepairedObject, parse_json, parse_line
from tinyllama.prepare.sources import check_no_pointer, compression_of, file_kind, language_of, text_field, url_field
from tinyllama.prepare.streams import (
    LONGEST_BYTES,
    READ_ERRORS,
    TOO_LONG,
    DecompressionLimit,
    RawFile,
    iter_documents,
    iter_lines,
    open_text,
    read_bytes,
)
from tinyllama.recipe import Source
from tinyllama.recipe.loading import printable
from tinyllama.text import TextLike

_SUBSET_FIELD = "redpajama_set_name"
_CSV_CHARACTERS = LONGEST_BYTES // 4  # a character of a string takes up to four bytes
_CSV_COMMAS = 4_000_000  # a field takes about 60 bytes as a Python object
_ROW_BYTES = 64  # counted per row, in addition to the row's text, since each rejected row is listed
_MAX_META_CHARACTERS = 10_000  # longer strings are not metadata
_MAX_NAMED_COLUMNS = 20  # in an error message
_MAX_REJECTED_ROWS = 1_000_000


@dataclass(frozen=True)
class RejectedRow:
    """A row that is not written to the store."""

    row: int
    """Position in the file, counted from 0."""
    reason: str
    """Reason for the rejection."""
    is_intentional: bool = False
    """Whether the recipe excludes the row; excluded rows are counted, but not listed as faults."""
    line: int | None = field(default=None, compare=False)
    """Number of the row's last line, counted from 1; None if the format is not read by lines."""
    fields: tuple[str, ...] = field(default=(), compare=False)
    """Names of the row's fields, if its text is unusable."""


@dataclass(frozen=True)
class SourceRow:
    """A usable row."""

    row: int
    """Position in the file, counted from 0."""
    text: TextLike
    """Document as a string, or as UTF-8 bytes if it is longer than LONG_BYTES."""
    subset: str = ""
    """SlimPajama's `redpajama_set_name` or Starcoderdata's language; empty for other formats."""
    repaired: bool = False
    """Whether a lone surrogate in the row was replaced by U+FFFD."""
    url: str | None = None
    """Address of the document; None if the row has none, or if the source's cleaning needs no URLs."""


class FileCounts:
    """Counts of one file's usable and rejected rows."""

    def __init__(self, path: str) -> None:
        self.path, self.usable, self.has_excluded = path, 0, False
        self.rejected: Counter[str] = Counter()

    def add(self, row: SourceRow | RejectedRow) -> None:
        """Count a row. Raises InputError if more than a million rows, and more than half of the rows, are rejected."""
        if isinstance(row, SourceRow):
            self.usable += 1
        elif row.is_intentional:
            self.has_excluded = True
        else:
            self.rejected[row.reason] += 1
            total = self.rejected.total()
            if total > _MAX_REJECTED_ROWS and total > self.usable:
                raise InputError(
                    f"{self.path}: {total:,} rows are rejected (the last one: {row.reason}); exclude this file from "
                    "the source"
                )

    def warnings(self) -> list[dict[str, Any]]:
        """Return a list of one manifest entry if no row or only a minority of rows is usable; else an empty list."""
        total = self.rejected.total()
        if total > self.usable or (not self.usable and not self.has_excluded):
            return [{"file": self.path, "rows": self.usable + total, "rejected": dict(sorted(self.rejected.items()))}]
        return []


def read_rows(
    path: str, source: Source, local: Path | None = None, counts: FileCounts | None = None
) -> Iterator[SourceRow | RejectedRow]:
    """Yield every row of a file, usable or rejected, and count the row in `counts`.

    `local` is a local copy of the file, if one already exists. Raises InputError if the file cannot be read to its end,
    is a Git pointer file, lacks a column, or has too many rejected rows (see `FileCounts.add`).
    """
    counts = counts or FileCounts(path)
    with local_copy(path) if local is None else nullcontext(local) as copy, translate_read_errors(path, READ_ERRORS):
        if copy.stat().st_size <= MAX_POINTER_BYTES:
            check_no_pointer(path, copy.read_bytes())
        file = RawFile(copy, path, compression_of(path), source.max_compression_ratio)
        for row in map(partial(_to_row, source, path), count(), _read_fields(file, source)):
            counts.add(row)
            yield row
            del row  # frees its text before the next row is read


Fields = Iterator[tuple[int | None, dict[str, Any] | str]]
"""One pair per row: the number of the row's last line (see `RejectedRow.line`), and the fields or the reject reason."""


def _read_fields(file: RawFile, source: Source) -> Fields:
    column, one_of = text_field(source), ("meta", _SUBSET_FIELD) if source.format == "slimpajama" else ()
    url = url_field(source)
    match file_kind(file.name, source.format):
        case "parquet":
            columns = _select_columns(parquet_columns(file.local), file.name, column, one_of, url)
            return _limited(file, parquet_rows(file.local, file.name, columns))
        case "arrow":
            columns = _select_columns(arrow_columns(file.local), file.name, column, one_of, url)
            return _limited(file, arrow_rows(file.local, file.name, columns))
        case "csv":
            return _read_csv(file, column, url)
        case "text":
            return _read_text(file, source.separator, column)
        case _:
            # Unlike a loop variable, `map` does not keep a line in memory while its row is in use.
            return map(partial(parse_line, file.name), iter_lines(file))


def _limited(file: RawFile, rows: Iterator[dict[str, Any]]) -> Fields:
    """Yield rows; raise InputError when their total size exceeds the file's decompression limit."""
    limit = DecompressionLimit(file)
    for fields in rows:
        sizes = (len(value) for value in fields.values() if isinstance(value, TextLike | UnusableValue))
        limit.spend(_ROW_BYTES + sum(sizes))
        yield None, fields


def _select_columns(
    present: list[str], name: str, text: str, one_of: Sequence[str] = (), url: str | None = None
) -> list[str]:
    """Return the columns to read: the columns of `text` and `url`, and the columns of `one_of` that the file has.

    Raises InputError if a column is missing or duplicated.
    """
    found = [column for column in one_of if column in present]
    have = ", ".join(map(printable, present[:_MAX_NAMED_COLUMNS])) + ", …" * (len(present) > _MAX_NAMED_COLUMNS)
    if text not in present:
        raise InputError(f"{name}: no column {text!r} (it has {have}); set the source's text, or exclude the file")
    if one_of and not found:
        wanted = " or ".join(map(repr, one_of))
        raise InputError(f"{name}: no column {wanted} (it has {have}); set the source's format to parquet")
    if url is not None:
        url_column = url if url in present else url.partition(".")[0]
        if url_column not in present:
            remedy = "set the source's url, or clean.url_block_lists to []"
            raise InputError(f"{name}: no column {url!r} with URLs (it has {have}); {remedy}")
        found += [url_column] * (url_column not in (text, *found))
    for column in (text, *found):
        if present.count(column) > 1:
            raise InputError(f"{name}: two columns are named {column!r}; rename or remove one")
    return [text, *found]


def _to_row(
    source: Source, path: str, number: int, found: tuple[int | None, dict[str, Any] | str]
) -> SourceRow | RejectedRow:
    line, fields = found
    if isinstance(fields, str):
        return RejectedRow(number, fields, line=line)
    subset: str | None = language_of(path) if source.format == "starcoderdata" else ""
    if source.format == "slimpajama":
        subset = _subset_of(fields)
        if subset is None:
            return RejectedRow(number, f"no meta.{_SUBSET_FIELD}", line=line, fields=tuple(fields))
        if subset in source.exclude or (source.include and subset not in source.include):
            return RejectedRow(number, f"excluded: {subset}", is_intentional=True)
    column, url = text_field(source), url_field(source)
    text = fields.get(column)
    if isinstance(text, TextLike) and text:
        is_repaired = isinstance(fields, RepairedObject)
        return SourceRow(number, text, subset or "", is_repaired, _url_of(fields, url) if url else None)
    return RejectedRow(number, _reject_reason(text, column), line=line, fields=tuple(fields))


def _url_of(fields: dict[str, Any], name: str) -> str | None:
    """Return the string in a field, or in the field of an object (`meta.url`); None if there is none."""
    outer, _, inner = name.partition(".")
    value = fields.get(name)
    if value is None and isinstance(part := fields.get(outer), dict):
        value = part.get(inner)
    return value if isinstance(value, str) and value else None


def _reject_reason(value: object, column: str) -> str:
    if isinstance(value, UnusableValue):
        return value.reason.format(column=column)
    if value is None:
        return f"no {column}"
    return f"empty {column}" if isinstance(value, TextLike) else f"{column} is not text"


def _subset_of(fields: dict[str, Any]) -> str | None:
    """Return a SlimPajama row's subset from `meta` (object or string) or, in re-uploads, from a separate field."""
    meta = fields.get("meta")
    if isinstance(meta, dict):
        name = meta.get(_SUBSET_FIELD)
    elif isinstance(meta, str) and len(meta) <= _MAX_META_CHARACTERS:
        name = _subset_from_repr(meta)
    else:
        name = fields.get(_SUBSET_FIELD)
    return name if isinstance(name, str) else None


@lru_cache(maxsize=256)
def _subset_from_repr(meta: str) -> str | None:
    """Return the subset from an object's string in JSON or in Python's repr; None if the string has no subset."""
    without_nan = re.sub(r"\b(nan|inf)\b", "0", meta)  # literal_eval does not parse these words
    for form in ("json", "repr"):
        try:
            fields: Any = parse_json(meta.encode()) if form == "json" else ast.literal_eval(without_nan)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # the documented errors of literal_eval
            continue
        name = fields.get(_SUBSET_FIELD) if isinstance(fields, dict) else None
        return name.encode(errors="replace").decode() if isinstance(name, str) else None
    return None


def _read_text(file: RawFile, separator: str | None, column: str) -> Fields:
    for data in iter_documents(file, separator) if separator else [read_bytes(file)]:
        if data is None:
            yield None, TOO_LONG
            continue
        text = decode_utf8(memoryview(data))
        is_binary = isinstance(text, UnusableValue) or b"\0" in data  # UTF-16 and most binary files have NUL bytes
        yield None, "not UTF-8 text" if is_binary else {column: text}


def _read_csv(file: RawFile, column: str, url: str | None) -> Fields:
    csv.field_size_limit(_CSV_CHARACTERS)
    with open_text(file) as text:
        lines = _CsvLines(text, file.name)
        rows = csv.reader(lines, strict=True)  # a file that ends inside quotes causes an error
        try:
            header = next(rows, [])
            places = {name: header.index(name) for name in _check_csv_header(header, file.name, column, url)}
            num_columns = len(header)
            del header
            lines.record_characters = lines.record_commas = 0
            # Unlike csv.DictReader, `map` keeps no row in memory and builds no dict of all columns.
            for found in map(partial(_select_csv_fields, places, num_columns), rows):
                lines.record_characters = lines.record_commas = 0
                if found:  # a blank line is not a row
                    yield rows.line_num, found
        except csv.Error as error:
            remedy = 'quote fields with " and double each " in a field, or convert the file to parquet'
            if "unexpected end" in str(error):
                remedy = "close the quote that is open at the end of the file, or fetch the file again"
            raise InputError(
                f"{file.name}: cannot be read to its end (line {rows.line_num}: {error}); {remedy}"
            ) from None


def _select_csv_fields(places: dict[str, int], num_columns: int, fields: list[str]) -> dict[str, Any] | str:
    """Return the values of a csv row in some columns, or a reject reason; the dict is empty for a blank line."""
    if len(fields) > num_columns:
        return "more fields than columns"
    if not fields:
        return {}
    return {name: _csv_value(fields[place] if place < len(fields) else None) for name, place in places.items()}


class _CsvLines:
    """Lines of a csv file. Raises InputError for a record with more than _CSV_CHARACTERS or _CSV_COMMAS."""

    def __init__(self, file: TextIOBase, name: str) -> None:
        self.file, self.name = file, name
        self.record_characters = self.record_commas = 0

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(_CSV_CHARACTERS):
            self.record_characters += len(line)
            self.record_commas += line.count(",")
            if self.record_characters >= _CSV_CHARACTERS or self.record_commas > _CSV_COMMAS:
                raise InputError(
                    f"{self.name}: a record has more than {_CSV_CHARACTERS:,} characters or {_CSV_COMMAS:,} commas; "
                    "correct it, or convert the file to parquet"
                )
            yield line


def _check_csv_header(header: list[str], name: str, text: str, url: str | None) -> list[str]:
    """Return the columns to read. Raises InputError if a csv file has no header line, or lacks a column."""
    if not header:
        raise InputError(f"{name}: empty, without a line of column names; exclude the file")
    if any("\0" in column or isinstance(_csv_value(column), UnusableValue) for column in header):
        raise InputError(f"{name}: the column names are not UTF-8; convert the file to UTF-8, for example with iconv")
    separator = next((character for character in ";\t|" if character in header[0]), None)
    if len(header) == 1 and separator and header[0] != text:
        raise InputError(f"{name}: columns are separated by {separator!r}; convert the file to commas, or to parquet")
    return _select_columns(header, name, text, url=url)


def _csv_value(text: str | None) -> str | UnusableValue | None:
    """Return a csv field, or a placeholder if the field has lone surrogates, which replace invalid UTF-8."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return UnusableValue("{column} is not UTF-8")
    return text
