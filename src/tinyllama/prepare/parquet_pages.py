"""Sizes of a parquet column's pages, read from their headers before pyarrow allocates memory for them.

pyarrow unpacks a page at once and exposes no header. Headers are structs of Thrift's compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md), see PageHeader in parquet.thrift.
"""

from collections.abc import Iterator
from typing import Any

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
_TYPE, _UNPACKED, _PACKED = 1, 2, 3
"""Field numbers of a page's type and of its sizes in bytes."""
_DICTIONARY = 2


class PageError(Exception):
    """A page's header that cannot be read."""


def pages(data: Any, chunk: Any) -> Iterator[tuple[bool, int]]:
    """Yield whether a page is a dictionary, and its unpacked size in bytes, for each page of a column chunk.

    `data` are the file's bytes. Raises PageError at a header that cannot be read.
    """
    places = [place for place in (chunk.dictionary_page_offset, chunk.data_page_offset) if place]
    place = min(places, default=0)
    end = place + chunk.total_compressed_size
    while place < end:
        try:
            header, place = _struct(data, place)
            kind, unpacked, packed = header[_TYPE], header[_UNPACKED], header[_PACKED]
        except (IndexError, KeyError, RecursionError):
            raise PageError("a page's header cannot be read") from None
        if packed < 0 or unpacked < 0:
            raise PageError("a page's size is negative")
        yield kind == _DICTIONARY, unpacked
        place += packed


def _struct(data: Any, place: int) -> tuple[dict[int, int], int]:
    """Return the integers of a struct by field number, and the place after it."""
    fields: dict[int, int] = {}
    number = 0
    while (head := data[place]) != _STOP:
        place += 1
        if head >> 4:
            number += head >> 4
        else:
            number, place = _integer(data, place)
        fields[number], place = _value(data, place, head & 15)
    return fields, place + 1


def _value(data: Any, place: int, kind: int) -> tuple[int, int]:
    """Return a value, 0 unless it is an integer, and the place after it."""
    if kind in (_TRUE, _FALSE):
        return 0, place
    if kind in (_BYTE, _DOUBLE):
        return 0, place + (1 if kind == _BYTE else 8)
    if kind == _BINARY:
        size, place = _varint(data, place)
        return 0, place + size
    if kind == _STRUCT:
        return 0, _struct(data, place)[1]
    if kind in (_LIST, _SET, _MAP):  # no page header has one
        raise KeyError(kind)
    return _integer(data, place)


def _integer(data: Any, place: int) -> tuple[int, int]:
    value, place = _varint(data, place)
    return (value >> 1) ^ -(value & 1), place


def _varint(data: Any, place: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := data[place]) & 128:
        if shift > 63:  # no number of a header has more bits
            raise IndexError(place)
        value |= (byte & 127) << shift
        shift, place = shift + 7, place + 1
    return value | byte << shift, place + 1
