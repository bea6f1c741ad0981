"""Reader of the rows of parquet and arrow files, in batches of about 16 MB.

Only the requested columns are read. Row groups of public data sets range from a few rows to gigabytes, so each row
group is read page by page. pyarrow decompresses complete pages in memory but does not expose their sizes, so this
module first reads the sizes from the page headers.
"""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from tinyllama.errors import InputError
from tinyllama.prepare.streams import LONG_BYTES, LONGEST_BYTES, TOO_LONG
from tinyllama.recipe.loading import printable
from tinyllama.text import TextLike, is_utf8

_BATCH_BYTES = 16 << 20
_MAX_BATCH_BYTES = 256 << 20
_MAX_BATCH_ROWS = 1024
_MAX_PAGE_BYTES = 512 << 20
_BUFFER_BYTES = 1 << 20
_ARROW_FILE, _END_OF_STREAM = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
_MAX_ARROW_ALIGNMENT = 64
_OLD_COMPRESSION = b"ARROW:experimental_compression"
_BINARY_TYPES = {
    pyarrow.string(): pyarrow.binary(),
    pyarrow.large_string(): pyarrow.large_binary(),
    pyarrow.string_view(): pyarrow.binary_view(),
}
"""Binary type with the same layout, by text type; binary values need not be UTF-8."""


@dataclass(frozen=True)
class UnusableValue:
    """Placeholder for a value that cannot be a document."""

    reason: str
    """Reject reason, with `{column}` as a placeholder for the name of the column."""
    size: int = 0
    """Size of the value in bytes."""

    def __len__(self) -> int:
        return self.size


# Values other than text are not converted, since Python cannot represent some, such as a date in the year 30,000.
_NON_TEXT = UnusableValue("{column} is not text")
_INVALID_UTF8 = UnusableValue("{column} is not UTF-8")


def decode_utf8(utf8: memoryview) -> TextLike | UnusableValue:
    """Return a document as a string, or unchanged if it has more than LONG_BYTES.

    Returns a placeholder if the document is unusable.
    """
    if len(utf8) > LONGEST_BYTES:
        return UnusableValue(TOO_LONG, len(utf8))
    if len(utf8) > LONG_BYTES:
        return utf8 if is_utf8(utf8) else _INVALID_UTF8
    try:
        return str(utf8, "utf-8")
    except UnicodeDecodeError:
        return _INVALID_UTF8


def parquet_columns(file: Path | BinaryIO) -> list[str]:
    """Return the column names of a parquet file. Raises ArrowException or OSError for any other file."""
    return list(pyarrow.parquet.read_schema(file).names)


def parquet_rows(local: Path, name: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file with the given columns; error messages contain `name`.

    Raises InputError if a decompressed page is larger than _MAX_PAGE_BYTES, or if a column contains lists.
    """
    with (
        pyarrow.parquet.ParquetFile(local, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file,
        local.open("rb") as raw,
        mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        _check_no_lists(file.schema_arrow, name, columns)
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            chunks = [group.column(index) for index in range(group.num_columns)]
            chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
            num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks)
            mean_rows = _batch_rows(group.num_rows, num_bytes)
            size = min(mean_rows, *(_bounded_rows(data, name, chunk) for chunk in chunks))
            batches = file.iter_batches(size, row_groups=[number], columns=list(columns), use_threads=False)
            if mean_rows == 1 and num_bytes < _MAX_BATCH_BYTES:
                batches = iter(list(batches))  # an open reader keeps two more copies of a long document
            yield from chain.from_iterable(map(_batch_to_rows, batches))


def _bounded_rows(data: mmap.mmap, name: str, chunk: Any) -> int:
    """Return the maximum number of rows per batch for which a column takes at most _MAX_BATCH_BYTES.

    This number assumes that each value is as long as the entire dictionary of the column chunk.

    Raises InputError if a page is larger than _MAX_PAGE_BYTES.
    """
    # With DELTA_BYTE_ARRAY, a few bytes can repeat the complete previous value, so a small page can hold long values.
    rows = 1 if "DELTA_BYTE_ARRAY" in chunk.encodings else _MAX_BATCH_ROWS
    column = printable(chunk.path_in_schema)
    try:
        for is_dictionary, size in _iter_pages(data, chunk):
            if size > _MAX_PAGE_BYTES:
                raise InputError(
                    f"{name}: a page of {column} has {size:,} bytes, more than {_MAX_PAGE_BYTES:,}; rewrite the file "
                    "with fewer rows per page, or exclude it"
                )
            if is_dictionary:
                rows = max(1, min(rows, _MAX_BATCH_BYTES // max(1, size)))
    except (IndexError, KeyError, RecursionError):
        raise InputError(f"{name}: a page header of {column} is damaged; rewrite the file, or exclude it") from None
    return rows


def _check_no_lists(schema: Any, name: str, columns: Sequence[str]) -> None:
    """Raise InputError if a column contains lists, since a few bytes can represent lists with millions of items."""

    def has_lists(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(has_lists(kind.field(number).type) for number in range(kind.num_fields))
        return bool(pyarrow.types.is_nested(kind))

    for column in columns:
        if has_lists(schema.field(column).type):
            raise InputError(f"{name}: column {printable(column)} contains lists; rewrite it as text")


def arrow_columns(local: Path) -> list[str]:
    """Return the column names of an arrow file. Raises ArrowException or OSError for any other file."""
    with pyarrow.OSFile(str(local)) as file:
        return list(_open_arrow(file).schema.names)


def arrow_rows(local: Path, name: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of an arrow file, in the stream format (which `datasets` writes) or the file format.

    Raises EOFError if the file is truncated, InputError if a column contains lists or a record batch is too large.
    """
    with pyarrow.OSFile(str(local)) as file:
        reader = _open_arrow(file)
        _check_no_lists(reader.schema, name, columns)
        _check_end(local)
        _check_batch_sizes(local, name)
        for batch in reader:
            selected = batch.select(list(columns))
            selected.validate()  # the reader does not check whether the sizes in a file are consistent
            num_bytes = selected.get_total_buffer_size()
            step = _batch_rows(selected.num_rows, num_bytes)
            if any(_may_share_values(field.type) for field in selected.schema):  # each row may have the longest value
                step = max(1, min(step, _MAX_BATCH_BYTES // max(1, num_bytes)))
            for start in range(0, selected.num_rows, step):
                yield from _batch_to_rows(selected.slice(start, step))


def _may_share_values(kind: Any) -> bool:
    """Return whether several rows of a column of type `kind` can share the bytes of one value."""
    types = pyarrow.types
    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    if types.is_struct(kind):
        return any(_may_share_values(field.type) for field in kind)
    return bool(types.is_dictionary(kind) or types.is_string_view(kind) or types.is_binary_view(kind))


def _stream_start(file: Any) -> int:
    """Return the offset of the stream in an open arrow file.

    In the file format, the stream follows a magic string, which pyarrow pads to 8 bytes and arrow-rs to 64 bytes.
    """
    file.seek(0)
    if file.read(8)[: len(_ARROW_FILE)] != _ARROW_FILE:
        return 0
    start = 8
    while start < _MAX_ARROW_ALIGNMENT and file.read(8) == bytes(8):
        start += 8
    return start


def _open_arrow(file: Any) -> Any:
    file.seek(_stream_start(file))
    return pyarrow.ipc.open_stream(file)


def _check_end(local: Path) -> None:
    """Raise EOFError if the end marker is missing; arrow's reader accepts a stream that ends between two batches."""
    with local.open("rb") as file:
        marker = _ARROW_FILE if _stream_start(file) else _END_OF_STREAM
        file.seek(-min(len(marker), local.stat().st_size), 2)
        if file.read() != marker:
            raise EOFError("the arrow stream is truncated")


def _check_batch_sizes(local: Path, name: str) -> None:
    """Raise InputError if a record batch and its dictionaries together decompress to more than _MAX_PAGE_BYTES.

    pyarrow decompresses complete record batches in memory but does not expose their sizes. Files with the compression
    of arrow before 1.0 are refused, because this function cannot read their sizes.
    """
    held, dictionaries = 0, dict[int, int]()
    with pyarrow.memory_map(str(local)) as file:
        file.seek(_stream_start(file))
        for message in pyarrow.ipc.MessageReader.open_stream(file):
            if message.type == "schema":
                continue
            data = memoryview(message.metadata)
            if _OLD_COMPRESSION in data.tobytes():
                raise InputError(
                    f"{name}: compressed as in arrow before version 1.0; write it with a newer version of arrow"
                )
            table = batch = _table(data, _field(data, _table(data, 0), 2))
            if message.type == "dictionary":
                batch = _table(data, _field(data, table, 1))
            size = _decompressed_bytes(data, batch, memoryview(message.body or b""))
            if held + size > _MAX_PAGE_BYTES:  # a replaced dictionary is freed only after the new one is read
                raise InputError(
                    f"{name}: a record batch decompresses to {held + size:,} bytes, more than {_MAX_PAGE_BYTES:,}; "
                    "convert the file to parquet, or exclude it"
                )
            if message.type == "dictionary":
                place, delta = _field(data, table, 0), _field(data, table, 2)
                number = place and _integer(data, place, 8)
                if not (delta and data[delta]):
                    held -= dictionaries.pop(number, 0)
                dictionaries[number] = dictionaries.get(number, 0) + size
                held += size


def _decompressed_bytes(data: memoryview, batch: int, body: memoryview) -> int:
    """Return the decompressed size of a record batch's compressed buffers; each begins with its decompressed size."""
    if not _field(data, batch, 3):  # not compressed
        return 0
    buffers = _table(data, _field(data, batch, 2))
    end = min(len(data), buffers + 4 + 16 * _integer(data, buffers))
    spans = ((_integer(data, place, 8), _integer(data, place + 8, 8)) for place in range(buffers + 4, end, 16))
    return sum(max(0, _integer(body, start, 8)) for start, length in spans if length)


# Readers of Flatbuffers (see Message.fbs of arrow's format): `_table` returns the offset of a table or a vector, and
# `_field` the offset of a table's field, or 0 if the field is absent.
def _table(data: memoryview, place: int) -> int:
    return place + _integer(data, place)


def _field(data: memoryview, table: int, number: int) -> int:
    vtable = table - _integer(data, table)
    place = vtable + 4 + 2 * number
    offset = _integer(data, place, 2) if place < vtable + _integer(data, vtable, 2) else 0
    return offset and table + offset


def _integer(data: memoryview, place: int, size: int = 4) -> int:
    return int.from_bytes(data[place : place + size], "little", signed=size != 2)  # fields of a vtable are unsigned


def _batch_rows(num_rows: int, num_bytes: int) -> int:
    """Return how many rows of mean size fit into _BATCH_BYTES, but at least 1 and at most _MAX_BATCH_ROWS."""
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * num_rows // max(1, num_bytes)))


def _batch_to_rows(batch: Any) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    columns = [_decode_column(column) for column in batch.columns]
    del batch  # the columns are copies
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _decode_column(column: Any) -> list[Any]:
    """Return the values of a column of strings, or of structs that may contain strings.

    Null values become None, and values of other types become placeholders.
    """
    types = pyarrow.types
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if types.is_dictionary(column.type):
        column = pyarrow.DictionaryArray.from_arrays(column.indices, column.dictionary).dictionary_decode()
    if types.is_struct(column.type):
        names = [field.name for field in column.type]
        values = zip(*map(_decode_column, column.flatten()), strict=True) if names else [()] * len(column)
        valid = column.is_valid().to_pylist()
        return [dict(zip(names, row, strict=True)) if ok else None for row, ok in zip(values, valid, strict=True)]
    kind = _BINARY_TYPES.get(column.type, column.type)
    if kind not in _BINARY_TYPES.values() and not types.is_fixed_size_binary(kind):
        return [_NON_TEXT if ok else None for ok in column.is_valid().to_pylist()]
    column = column.view(kind)
    column.validate(full=True)  # damaged offsets could refer to the bytes of other rows
    # Each string is decoded separately. Arrow's conversion makes a copy, and fails for all strings if one is invalid.
    return [decode_utf8(memoryview(value.as_buffer())) if value.is_valid else None for value in column]


# Field numbers of a page header (see PageHeader in parquet.thrift).
_PAGE_TYPE, _DECOMPRESSED_SIZE, _COMPRESSED_SIZE = 1, 2, 3
_DICTIONARY_PAGE = 2


def _iter_pages(data: mmap.mmap, chunk: Any) -> Iterator[tuple[bool, int]]:
    """Yield, for each page of a column chunk, whether it is a dictionary page and its decompressed size in bytes.

    Raises IndexError, KeyError or RecursionError if a header is damaged.
    """
    starts = [start for start in (chunk.dictionary_page_offset, chunk.data_page_offset) if start]
    reader = _ThriftReader(data, min(starts, default=0))
    end = reader.offset + chunk.total_compressed_size
    while reader.offset < end:
        header = reader.read_struct()
        sizes = header[_DECOMPRESSED_SIZE], header[_COMPRESSED_SIZE]
        if min(sizes) < 0:
            raise IndexError("negative size")
        yield header[_PAGE_TYPE] == _DICTIONARY_PAGE, sizes[0]
        reader.offset += sizes[1]


class _ThriftReader:
    """Reader of the part of Thrift's compact protocol that page headers use.

    See https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self.data, self.offset = data, offset

    def read_struct(self) -> dict[int, int]:
        """Return the integers of a struct by field number; fields of other types are 0."""
        fields: dict[int, int] = {}
        number = 0
        while head := self._read_byte():
            number = number + (head >> 4) if head >> 4 else self._read_integer()
            fields[number] = self._read_value(head & 15)
        return fields

    def _read_value(self, kind: int) -> int:
        match kind:
            case 4 | 5 | 6:  # integers of 16, 32 and 64 bits
                return self._read_integer()
            case 3:  # a byte
                self._read_byte()
            case 7:  # a double
                self.offset += 8
            case 8:  # a string
                size = self._read_varint()
                self.offset += size
            case 12:
                self.read_struct()
            case kind if kind not in (1, 2):  # true and false have no bytes; page headers have no other types
                raise KeyError(kind)
        return 0

    def _read_integer(self) -> int:
        value = self._read_varint()
        return (value >> 1) ^ -(value & 1)

    def _read_varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):  # at most 64 bits
            byte = self._read_byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise IndexError("a number of more than 64 bits")

    def _read_byte(self) -> int:
        self.offset += 1
        return self.data[self.offset - 1]
