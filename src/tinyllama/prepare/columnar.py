"""The rows of parquet and arrow files, about 16 MB of them at a time.

Reads only the columns asked for, and a row group's pages one after the other rather than a row group whole: those of
public data sets hold from a few rows to gigabytes.
"""

import mmap
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from tinyllama.errors import InputError
from tinyllama.prepare.large_strings import LONG_BYTES, LONGEST_BYTES
from tinyllama.prepare.parquet_pages import PageError, pages
from tinyllama.recipe.loading import printable
from tinyllama.text import TextLike, is_utf8

_BATCH_BYTES = 16 << 20
_MOST_BYTES = 256 << 20
_PAGE_BYTES = 512 << 20
_MOST_ROWS = 1024
_BUFFER_BYTES = 1 << 20
# What ends arrow's stream; its reader takes a file that is cut between two batches for a whole one.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class InvalidUtf8:
    """Stands for a value that is text by its type but not UTF-8 by its bytes."""


class Oversized:
    """Placeholder for a text of more than LONGEST_BYTES; `len` is its size in bytes."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


_NON_TEXT = object()
"""Stands for a value that is no text; as Python's own object it may not exist, such as a date in the year 30,000."""


def parquet_columns(file: Path | BinaryIO) -> list[str]:
    """Names of a parquet file's columns. Raises ArrowException or OSError where it is not one."""
    return list(pyarrow.parquet.read_schema(file).names)


def parquet_rows(local: Path, name: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, of which only `columns` are read.

    Raises InputError where a page of them unpacks to more than a reader holds.
    """
    with (
        pyarrow.parquet.ParquetFile(local, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file,
        local.open("rb") as raw,
        mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        _check_flat(file.schema_arrow, name, columns)
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            chunks = [group.column(place) for place in range(group.num_columns)]
            chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
            num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks)
            usual = _batch_rows(group.num_rows, num_bytes)
            size = min(usual, *(_most_rows(data, name, chunk) for chunk in chunks))
            batches = file.iter_batches(size, row_groups=[number], columns=list(columns), use_threads=False)
            if usual == 1 and num_bytes < _MOST_BYTES:
                batches = iter(list(batches))  # the reader holds a long document twice more for as long as it is there
            yield from chain.from_iterable(map(_rows, batches))


def _most_rows(data: Any, name: str, chunk: Any) -> int:
    """Return how many rows at a time hold at most _MOST_BYTES if each has the longest value of the chunk's dictionary.

    Raises InputError where a page holds more than _PAGE_BYTES.
    """
    rows = _MOST_ROWS
    if "DELTA_BYTE_ARRAY" in chunk.encodings:  # a value may repeat all of the one before
        rows = 1
    column = printable(chunk.path_in_schema)
    try:
        for is_dictionary, size in pages(data, chunk):
            if size > _PAGE_BYTES:
                raise InputError(
                    f"{name}: a page of {column} holds {size:,} bytes, more than {_PAGE_BYTES:,}; write it again with "
                    "fewer rows per page, or take it out"
                )
            if is_dictionary:
                rows = max(1, min(rows, _MOST_BYTES // max(1, size)))
    except PageError as error:
        raise InputError(f"{name}: column {column}: {error}; write it again, or take it out") from None
    return rows


def _check_flat(schema: Any, name: str, columns: Sequence[str]) -> None:
    """Raise InputError where a column holds lists, of which a few bytes can hold millions of numbers."""
    for column in columns:
        if _holds_lists(schema.field(column).type):
            raise InputError(f"{name}: column {printable(column)} holds lists, not text; write it without them")


def _holds_lists(kind: Any) -> bool:
    if pyarrow.types.is_struct(kind):
        return any(_holds_lists(kind.field(number).type) for number in range(kind.num_fields))
    return bool(pyarrow.types.is_nested(kind))


def arrow_columns(local: Path) -> list[str]:
    """Names of an arrow file's columns. Raises ArrowException or OSError where it is not one."""
    with pyarrow.OSFile(str(local)) as file:
        return list(_arrow_reader(file).schema.names)


def arrow_rows(local: Path, name: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of an arrow file, in its stream format (as `datasets` writes) or its file format.

    Raises EOFError where a stream lacks its end, InputError where a column holds lists.
    """
    with pyarrow.OSFile(str(local)) as file:
        reader = _arrow_reader(file)
        _check_flat(reader.schema, name, columns)
        if isinstance(reader, pyarrow.RecordBatchFileReader):
            batches = (reader.get_batch(place) for place in range(reader.num_record_batches))
        else:
            _check_end(local)
            batches = iter(reader)
        for batch in batches:
            own = batch.select(list(columns))
            own.validate()  # its reader does not look whether the numbers in a file fit together
            step = min(_batch_rows(own.num_rows, own.nbytes), *map(_most_decoded, own.columns))
            for start in range(0, own.num_rows, step):
                yield from _rows(own.slice(start, step))


def _most_decoded(column: Any) -> int:
    """Return how many rows at a time hold at most _MOST_BYTES if each has all bytes of the column's dictionary."""
    if not pyarrow.types.is_dictionary(column.type) or not len(column.dictionary):
        return _MOST_ROWS
    return max(1, min(_MOST_ROWS, _MOST_BYTES // max(1, int(column.dictionary.nbytes))))


def _arrow_reader(file: Any) -> Any:
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    return pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)


def _check_end(local: Path) -> None:
    with local.open("rb") as file:
        file.seek(-min(len(_END_OF_STREAM), local.stat().st_size), 2)
        if file.read() != _END_OF_STREAM:
            raise EOFError("the arrow stream is cut off")


def _batch_rows(num_rows: int, num_bytes: int) -> int:
    """Rows that hold about `_BATCH_BYTES`, going by the mean."""
    return max(1, min(_MOST_ROWS, _BATCH_BYTES * num_rows // max(1, num_bytes)))


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    columns = [_values(column) for column in batch.columns]
    del batch  # these are copies of it
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _values(column: Any) -> list[Any]:
    """A column's values as far as they may be text, or hold it: of all others it is only known that they are there."""
    types = pyarrow.types
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if types.is_dictionary(column.type):
        _check_offsets_monotonic(
            [0, *column.indices.drop_null().unique().sort().to_pylist(), len(column.dictionary) - 1]
        )
        column = column.dictionary_decode()
    if any(test(column.type) for test in (types.is_string_view, types.is_binary_view, types.is_fixed_size_binary)):
        column = column.cast(pyarrow.binary()).cast(pyarrow.large_binary())
    if types.is_string(column.type) or types.is_binary(column.type):
        return _texts(column, np.int32)
    if types.is_large_string(column.type) or types.is_large_binary(column.type):
        return _texts(column, np.int64)
    return _structs(column) if types.is_struct(column.type) else _presence(column, _NON_TEXT)


def _structs(column: Any) -> list[Any]:
    names = [field.name for field in column.type]
    rows = zip(*map(_values, column.flatten()), strict=True) if names else [()] * len(column)
    there = _presence(column, True)
    return [dict(zip(names, row, strict=True)) if valid else None for row, valid in zip(rows, there, strict=True)]


def _presence(column: Any, mark: object) -> list[Any]:
    """A mark for each value, and None where there is none."""
    return [mark if valid else None for valid in column.is_valid().to_pylist()]


def _texts(column: Any, offset_type: type[np.integer[Any]]) -> list[Any]:
    """Strings of arrow's layout, decoded where they lie: its own scalars are copies, and one bad row fails a batch."""
    if not len(column):
        return []
    _, offsets, content = column.buffers()
    stop = column.offset + len(column) + 1  # behind it a damaged file may hold half a number
    ends = np.frombuffer(offsets, offset_type, stop)[column.offset :].tolist()
    view = memoryview(content or b"")
    _check_offsets_monotonic([0, *ends, len(view)])
    valid = column.is_valid().to_pylist()
    return [
        _decoded(view[start:end]) if there else None for (start, end), there in zip(pairwise(ends), valid, strict=True)
    ]


def _check_offsets_monotonic(places: list[int]) -> None:
    """Raise ArrowInvalid where places do not rise: a damaged file could otherwise give one row's bytes to another."""
    if any(place > following for place, following in pairwise(places)):
        raise pyarrow.ArrowInvalid("offsets that do not rise")


def _decoded(utf8: memoryview) -> TextLike | InvalidUtf8 | Oversized:
    if len(utf8) > LONGEST_BYTES:
        return Oversized(len(utf8))
    if len(utf8) > LONG_BYTES:
        return utf8 if is_utf8(utf8) else InvalidUtf8()
    try:
        return str(utf8, "utf-8")
    except UnicodeDecodeError:
        return InvalidUtf8()
