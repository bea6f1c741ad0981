"""One raw file to documents: SlimPajama, Starcoderdata, jsonl, parquet, arrow, text and csv.

An unusable row becomes a `RejectedRow` with its reason; a file that cannot be read to its end raises an error that
names it. Every format is first read into rows of fields, so that one function decides which rows are usable.
"""

import ast
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from io import TextIOBase
from pathlib import Path
from typing import Any

import orjson

from tinyllama.errors import InputError
from tinyllama.prepare.columnar import InvalidUtf8, Oversized, arrow_columns, arrow_rows, parquet_columns, parquet_rows
from tinyllama.prepare.endings import category_of
from tinyllama.prepare.large_strings import LONG_BYTES, LONGEST_BYTES, parse_long_line
from tinyllama.prepare.lenient_json import Repaired, loads
from tinyllama.prepare.lines import Budget, documents_of, iter_lines, opened_text, whole_file
from tinyllama.recipe import Source
from tinyllama.recipe.loading import printable
from tinyllama.text import TextLike, is_utf8

_SUBSET = "redpajama_set_name"
_TOO_LONG = f"longer than {LONGEST_BYTES >> 20} MiB"
"""Reject reason for a document above LONGEST_BYTES."""
_CSV_CHARACTERS = LONGEST_BYTES // 4  # up to four bytes each in a string
_ROW_BYTES = 64  # counted per row in addition to its text, since a reject is listed too
_LONGEST_META = 10_000  # characters; beyond it is no metadata
_MOST_NAMED = 20  # columns, in a message


@dataclass(frozen=True)
class RejectedRow:
    """A row that is not used."""

    row: int
    """Place in the file, counted from 0."""
    reason: str
    is_intentional: bool = False
    """Left out by the recipe rather than by a fault: counted, not listed."""
    line: int | None = field(default=None, compare=False)
    """Number, from 1, of the line that it ends on, where the file has lines."""


@dataclass(frozen=True)
class SourceRow:
    """A row that is used."""

    row: int
    """Place in the file, counted from 0."""
    text: TextLike
    """A string; of a document of many megabytes its UTF-8 bytes."""
    subset: str = ""
    """SlimPajama's `redpajama_set_name`, Starcoderdata's language; empty elsewhere."""
    repaired: bool = False
    """Whether a lone surrogate in it has become U+FFFD."""


Fields = Iterator[tuple[int | None, dict[str, Any] | str]]
"""By row: the line that it ends on, where the file has lines; and its fields, or why it has none."""


def iter_rows(local: Path, name: str, source: Source) -> Iterator[SourceRow | RejectedRow]:
    """Every row of the file `local`; `name` is its path or URL in the source, for errors and for its ending.

    Raises InputError where its format or columns are wrong, and what its reader raises where it cannot be read.
    """
    column = text_field(source)
    if source.format == "slimpajama":
        return _slimpajama(_fields(local, name, source, (column,), ("meta", _SUBSET)), source, column)
    subset = language_of(name) if source.format == "starcoderdata" else ""
    return _plain(_fields(local, name, source, (column,)), column, subset)


def text_field(source: Source) -> str:
    """Name of the field or column that holds a source's documents."""
    return source.text or ("content" if source.format == "starcoderdata" else "text")


def language_of(path: str) -> str:
    """Starcoderdata's name for the language of a file: the folder that it lies in."""
    return Path(path).parent.name


def _fields(local: Path, name: str, source: Source, needed: Sequence[str], one_of: Sequence[str] = ()) -> Fields:
    ratio = source.max_compression_ratio
    match category_of(name, source.format):
        case "parquet":
            columns = _columns(parquet_columns(local), name, needed, one_of)
            return _within(Budget(local, name, ratio), parquet_rows(local, name, columns))
        case "arrow":
            columns = _columns(arrow_columns(local), name, needed, one_of)
            return _within(Budget(local, name, ratio), arrow_rows(local, name, columns))
        case "csv":
            return _csv(local, name, needed, ratio)
        case "text":
            return _text(local, name, source.separator, needed[0], ratio)
        case _:
            return _json_lines(local, name, ratio)


def _within(budget: Budget, rows: Iterator[dict[str, Any]]) -> Fields:
    for fields in rows:
        budget.spend(
            _ROW_BYTES + sum(len(value) for value in fields.values() if isinstance(value, TextLike | Oversized))
        )
        yield None, fields


def _columns(present: list[str], name: str, needed: Sequence[str], one_of: Sequence[str]) -> list[str]:
    """The columns to read. Raises InputError where the file lacks one, or has it twice."""
    found = [column for column in one_of if column in present]
    have = ", ".join(map(printable, present[:_MOST_NAMED])) + ", …" * (len(present) > _MOST_NAMED)
    for column in needed:
        if column not in present:
            raise InputError(
                f"{name}: no column {column!r} (it has {have}); name the right one as text, or take the file out"
            )
    if one_of and not found:
        wanted = " or ".join(map(repr, one_of))
        raise InputError(f"{name}: no column {wanted} (it has {have}); read it by the format of its ending instead")
    for column in (*needed, *found):
        if present.count(column) > 1:
            raise InputError(f"{name}: two columns are called {column!r}; rename or take out one")
    return [*needed, *found]


def _plain(rows: Fields, column: str, subset: str) -> Iterator[SourceRow | RejectedRow]:
    for number, (line, fields) in enumerate(rows):
        if isinstance(fields, str):
            yield RejectedRow(number, fields, line=line)
        else:
            yield _validate_row(number, line, fields, column, subset)


def _slimpajama(rows: Fields, source: Source, column: str) -> Iterator[SourceRow | RejectedRow]:
    for number, (line, fields) in enumerate(rows):
        if isinstance(fields, str):
            yield RejectedRow(number, fields, line=line)
        elif (subset := _subset(fields)) is None:
            yield RejectedRow(number, f"no meta.{_SUBSET}", line=line)
        elif subset in source.exclude or (source.include and subset not in source.include):
            yield RejectedRow(number, f"excluded: {subset}", is_intentional=True)
        else:
            yield _validate_row(number, line, fields, column, subset)


def _validate_row(
    number: int, line: int | None, fields: dict[str, Any], column: str, subset: str
) -> SourceRow | RejectedRow:
    text = fields.get(column)
    if isinstance(text, TextLike):
        if text:
            return SourceRow(number, text, subset, isinstance(fields, Repaired))
        return RejectedRow(number, f"empty {column}", line=line)
    if isinstance(text, Oversized):
        return RejectedRow(number, _TOO_LONG, line=line)
    if isinstance(text, InvalidUtf8):
        return RejectedRow(number, f"{column} is not UTF-8", line=line)
    return RejectedRow(number, f"no {column}" if text is None else f"{column} is not text", line=line)


def _subset(fields: dict[str, Any]) -> str | None:
    """A SlimPajama row's subset: in `meta` as an object or its text, or, in re-uploads, in a field of its own."""
    meta = fields.get("meta")
    if isinstance(meta, dict):
        name = meta.get(_SUBSET)
    elif isinstance(meta, str) and len(meta) <= _LONGEST_META:
        name = _subset_from_repr(meta)
    else:
        name = fields.get(_SUBSET)
    return name if isinstance(name, str) else None


@lru_cache(maxsize=256)
def _subset_from_repr(meta: str) -> str | None:
    """The subset in the text of an object, as JSON or as Python's repr writes it; None where there is none."""
    for parse in (orjson.loads, ast.literal_eval, _with_nan):
        try:
            fields = parse(meta)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # what literal_eval is documented to raise
            continue
        name = fields.get(_SUBSET) if isinstance(fields, dict) else None
        return name.encode(errors="replace").decode() if isinstance(name, str) else None
    return None


def _with_nan(meta: str) -> Any:
    """The text of an object in which numbers may be `NaN`, or `nan` as repr writes it."""
    try:
        return loads(meta.encode())
    except ValueError:
        return ast.literal_eval(re.sub(r"\b(nan|inf)\b", "0", meta))


def _json_lines(local: Path, name: str, ratio: int) -> Fields:
    # A loop's variable would keep a line while its text is worked on.
    return map(partial(_parsed, name), iter_lines(local, name, ratio))


def _parsed(name: str, numbered: tuple[int, bytes | bytearray | None]) -> tuple[int, dict[str, Any] | str]:
    number, line = numbered
    if line is None:
        return number, _TOO_LONG
    try:
        is_long = len(line) > LONG_BYTES
        fields = parse_long_line(line) if is_long else loads(line)
        if is_long and fields is None:
            return number, _TOO_LONG
    except orjson.JSONDecodeError as error:
        if error.msg.startswith("Not enough memory"):
            raise MemoryError(error.msg) from None  # the row is none the worse for it
        if number == 1 and begins_longer_json(line):
            convert = "jq -c '.[]'" if line.lstrip()[:1] == b"[" else "jq -c ."
            raise InputError(
                f"{name}: holds JSON over several lines, but one JSON object per line is expected; convert it, such as "
                f"by {convert}"
            ) from None
        is_text = is_utf8(memoryview(line)) and b"\0" not in line  # UTF-16 has NUL bytes
        return number, "invalid JSON" if is_text else "not UTF-8 text"
    return number, fields if isinstance(fields, dict) else "not a JSON object"


def begins_longer_json(line: bytes | bytearray) -> bool:
    """Whether a line begins an array of several lines, or an object with each of its fields on a line."""
    if line.strip() == b"{":
        return True
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return line.lstrip()[:1] == b"[" and error.msg == "unexpected end of data"
    return False


def _text(local: Path, name: str, separator: str | None, column: str, ratio: int) -> Fields:
    for data in documents_of(local, name, separator, ratio) if separator else [whole_file(local, name, ratio)]:
        if data is None:
            yield None, _TOO_LONG
            continue
        try:
            yield None, {column: data if len(data) > LONG_BYTES and is_utf8(memoryview(data)) else data.decode()}
        except UnicodeDecodeError:
            yield None, "not UTF-8 text"


def _csv(local: Path, name: str, needed: Sequence[str], ratio: int) -> Fields:
    csv.field_size_limit(_CSV_CHARACTERS)
    with opened_text(local, name, ratio) as file:
        lines = _Lines(file, name)
        rows = csv.DictReader(lines, strict=True)  # a file cut inside quotes is an error
        try:
            _check_header(list(rows.fieldnames or ()), name, needed)
            for fields in rows:
                lines.held = 0
                if None in fields:
                    yield rows.line_num, "more fields than columns"
                else:
                    yield rows.line_num, {column: _decoded(fields[column]) for column in needed}
        except csv.Error as error:
            cut = "unexpected end" in str(error)
            remedy = (
                "close the quote that is open at its end, or fetch it again"
                if cut
                else ('put fields in " and double each " inside one, or convert the file to parquet')
            )
            raise InputError(
                f"{name}: cannot be read to its end (line {rows.reader.line_num}: {error}); {remedy}"
            ) from None


class _Lines:
    """Lines of a csv file; a record has at most _CSV_CHARACTERS."""

    def __init__(self, file: TextIOBase, name: str) -> None:
        self.file, self.name, self.held = file, name, 0

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(_CSV_CHARACTERS):
            self.held += len(line)
            if self.held >= _CSV_CHARACTERS:
                raise InputError(
                    f"{self.name}: a record has more than {_CSV_CHARACTERS:,} characters; correct it, or convert the "
                    "file to parquet"
                )
            yield line


def _check_header(header: list[str], name: str, needed: Sequence[str]) -> None:
    """Raise InputError where a csv file has no line of names, or not the needed ones."""
    if not header:
        raise InputError(f"{name}: is empty, without even a line of column names; take it out")
    if any("\0" in column or isinstance(_decoded(column), InvalidUtf8) for column in header):
        raise InputError(f"{name}: its column names are not UTF-8 text; convert it to UTF-8, such as by iconv")
    other = next((mark for mark in ";\t|" if mark in header[0]), None)
    if len(header) == 1 and other and header[0] not in needed:
        raise InputError(f"{name}: its columns are separated by {other!r}; convert it to commas, or to parquet")
    _columns(header, name, needed, ())


def _decoded(text: str | None) -> object:
    """A csv field, whose bytes that are not UTF-8 were read as lone surrogates."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return InvalidUtf8()
    return text
