"""One raw file to documents: SlimPajama, Starcoderdata, jsonl, parquet, arrow, text and csv.

A row that cannot be used becomes a `Reject` with its reason; a file that cannot be read to its end raises, naming the
file. Every format is first read into fields by row, so that what makes a row usable is said once.
"""

import ast
import codecs
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from tinyllama.data.lines import lines_of
from tinyllama.data.long_text import LONG_BYTES, parse_long_line
from tinyllama.data.tables import Undecodable, arrow_columns, arrow_rows, parquet_columns, parquet_rows
from tinyllama.errors import InputError
from tinyllama.recipe_data import Source
from tinyllama.recipe_errors import printable
from tinyllama.text import Text, is_utf8

_SUBSET = "redpajama_set_name"
_LONGEST_META = 10_000  # characters; beyond it is no metadata
_MOST_NAMED = 20  # columns, in a message


@dataclass(frozen=True)
class Reject:
    """A row that is not used."""

    row: int
    """Place in the file, counted from 0."""
    reason: str
    counted_only: bool = False
    """Left out by the recipe rather than by a fault: counted, not listed."""


@dataclass(frozen=True)
class Row:
    """A row that is used."""

    row: int
    """Place in the file, counted from 0."""
    text: Text
    """A string; of a document of many megabytes its UTF-8 bytes."""
    subset: str = ""
    """SlimPajama's `redpajama_set_name`, Starcoderdata's language; empty elsewhere."""


Fields = Iterator[dict[str, Any] | str]
"""By row: its fields, or why it has none."""


def rows_of(local: Path, name: str, source: Source) -> Iterator[Row | Reject]:
    """Every row of the file `local`; `name` is its path or URL in the source, for errors and for its ending.

    Raises InputError where its format or columns are wrong, and what its reader raises where it cannot be read.
    """
    field = text_field(source)
    if source.format == "slimpajama":
        return _slimpajama(_fields(local, name, source.format, (field,), ("meta", _SUBSET)), source, field)
    subset = language_of(name) if source.format == "starcoderdata" else ""
    return _plain(_fields(local, name, source.format, (field,)), field, subset)


def text_field(source: Source) -> str:
    """Name of the field or column that holds a source's documents."""
    return source.text or ("content" if source.format == "starcoderdata" else "text")


def language_of(path: str) -> str:
    """Starcoderdata's name for the language of a file: the folder that it lies in."""
    return Path(path).parent.name


def _fields(local: Path, name: str, format: str, needed: Sequence[str], one_of: Sequence[str] = ()) -> Fields:
    suffix = {"jsonl": ".jsonl", "parquet": ".parquet", "starcoderdata": ".parquet", "text": ".txt", "csv": ".csv"}
    match suffix.get(format, Path(name).suffix):
        case ".parquet":
            return parquet_rows(local, _columns(parquet_columns(local), name, needed, one_of))
        case ".arrow":
            return arrow_rows(local, _columns(arrow_columns(local), name, needed, one_of))
        case ".csv":
            return _csv(local, name, needed)
        case ".txt":
            return _text(local, needed[0])
        case _:
            return _json_lines(local, name)


def _columns(present: list[str], name: str, needed: Sequence[str], one_of: Sequence[str]) -> list[str]:
    """The columns to read. Raises InputError where the file lacks one, or has it twice."""
    found = [column for column in one_of if column in present]
    missing = [repr(column) for column in needed if column not in present]
    if one_of and not found:
        missing.append(" or ".join(map(repr, one_of)))
    if missing:
        have = ", ".join(map(printable, present[:_MOST_NAMED])) + ", …" * (len(present) > _MOST_NAMED)
        raise InputError(f"{name}: no column {missing[0]} (it has {have}); name the right one as text, or take it out")
    for column in (*needed, *found):
        if present.count(column) > 1:
            raise InputError(f"{name}: two columns are called {column!r}; rename or take out one")
    return [*needed, *found]


def _plain(rows: Fields, field: str, subset: str) -> Iterator[Row | Reject]:
    for number, fields in enumerate(rows):
        yield Reject(number, fields) if isinstance(fields, str) else _usable(number, fields, field, subset)


def _slimpajama(rows: Fields, source: Source, field: str) -> Iterator[Row | Reject]:
    for number, fields in enumerate(rows):
        if isinstance(fields, str):
            yield Reject(number, fields)
        elif (subset := _subset(fields)) is None:
            yield Reject(number, f"no meta.{_SUBSET}")
        elif subset in source.exclude or (source.include and subset not in source.include):
            yield Reject(number, f"excluded: {subset}", counted_only=True)
        else:
            yield _usable(number, fields, field, subset)


def _usable(number: int, fields: dict[str, Any], field: str, subset: str) -> Row | Reject:
    text = fields.get(field)
    if isinstance(text, Text):
        return Row(number, text, subset) if text else Reject(number, f"empty {field}")
    if isinstance(text, Undecodable):
        return Reject(number, f"{field} is not UTF-8")
    return Reject(number, f"no {field}" if text is None else f"{field} is not text")


def _subset(fields: dict[str, Any]) -> str | None:
    """A SlimPajama row's subset: in `meta` as an object or its text, or, in re-uploads, in a field of its own."""
    meta = fields.get("meta")
    if isinstance(meta, dict):
        name = meta.get(_SUBSET)
    elif isinstance(meta, str) and len(meta) <= _LONGEST_META:
        name = _named_in(meta)
    else:
        name = fields.get(_SUBSET)
    return name if isinstance(name, str) else None


@lru_cache(maxsize=256)
def _named_in(meta: str) -> object:
    """The subset in the text of an object, as JSON or as Python's repr writes it; None where there is none."""
    for parse in (orjson.loads, ast.literal_eval):
        try:
            fields = parse(meta)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # what literal_eval is documented to raise
            continue
        return fields.get(_SUBSET) if isinstance(fields, dict) else None
    return None


def _json_lines(local: Path, name: str) -> Fields:
    return map(_parsed, lines_of(local, name))  # a loop's variable would keep a line while its text is worked on


def _parsed(line: bytes | bytearray) -> dict[str, Any] | str:
    try:
        fields = parse_long_line(line) if len(line) > LONG_BYTES else orjson.loads(line)
    except orjson.JSONDecodeError as error:  # for lone surrogates too
        if error.msg.startswith("Not enough memory"):
            raise MemoryError(error.msg) from None  # the row is none the worse for it
        return "invalid JSON" if is_utf8(memoryview(line)) else "not UTF-8 text"
    return fields if isinstance(fields, dict) else "not a JSON object"


def _text(local: Path, field: str) -> Fields:
    try:
        data = local.read_bytes().removeprefix(codecs.BOM_UTF8)
        yield {field: data if len(data) > LONG_BYTES and is_utf8(memoryview(data)) else data.decode()}
    except UnicodeDecodeError:
        yield "not UTF-8 text"


def _csv(local: Path, name: str, needed: Sequence[str]) -> Fields:
    csv.field_size_limit(1 << 31)
    # Excel begins its files with a byte order mark, which would belong to the first column's name.
    with local.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, strict=True)  # a file cut inside quotes is an error
        if rows.fieldnames is None:
            raise InputError(f"{name}: is empty, without even a line of column names; take it out")
        _columns(list(rows.fieldnames), name, needed, ())
        for fields in rows:
            if None in fields:
                yield "more fields than columns"
            else:
                yield {column: _decoded(fields[column]) for column in needed}


def _decoded(text: str | None) -> object:
    """A csv field, whose bytes that are not UTF-8 were read as lone surrogates."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return Undecodable()
    return text
