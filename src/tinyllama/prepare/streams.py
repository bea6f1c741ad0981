"""Decompressed bytes of a raw file, as chunks, lines or documents of any length, in bounded memory.

Arrow's streams detect a truncated gzip member or zstd frame, but zstandard's own reader does not. Arrow's streams also
return small chunks, even for a high compression ratio. Arrow does not support xz, and Python's `LZMAFile`
ignores a damaged stream after the first stream, so this module uses the `lzma` decompressor directly.
"""

import codecs
import io
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow

from tinyllama.errors import InputError

LONG_BYTES = 32 << 20
"""Size in bytes above which a document remains bytes, because one emoji makes a Python string four times as large."""
LONGEST_BYTES = 256 << 20
"""Size in bytes above which a document, or a line of JSON, is rejected, to bound the memory of a reader."""
TOO_LONG = f"longer than {LONGEST_BYTES >> 20} MiB"
"""Reject reason for a document or line of more than LONGEST_BYTES."""
Part = bytes | bytearray | None
"""A line or document, or None if it is longer than LONGEST_BYTES."""
READ_ERRORS = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, pyarrow.ArrowException)
"""Exceptions that readers raise for a file that is damaged or does not have the expected format."""
_LINE_END = re.compile(rb"\n")
CHUNK_BYTES = 1 << 20
"""Size in bytes of a chunk of `iter_chunks`."""
_XZ_BYTES = 256 << 20  # memory limit; the largest preset, 9, needs 65 MiB
_UNLIMITED_BYTES = 1 << 20  # any file may decompress to this size, regardless of its ratio
_PLAIN = "plain text"
_HEAD_BYTES = 512
_ARCHIVES = (
    ("zip", 0, b"PK\3\4"),
    ("7z", 0, b"7z\xbc\xaf\x27\x1c"),
    ("lz4", 0, b"\x04\x22\x4d\x18"),
    ("tar", 257, b"ustar"),
)
"""Name of each kind of archive, and its identifying bytes with their offset."""
# The second alternative in the pattern for zstd matches a skippable frame, which parallel compressors write first.
_COMPRESSIONS = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
"""First bytes of each compression."""


@dataclass(frozen=True)
class RawFile:
    """A raw file on a local disk."""

    local: Path
    """Path of the file, or of its local copy."""
    name: str
    """Path or URL in the source, for error messages."""
    compression: str | None
    """Compression that the file's name declares."""
    max_ratio: int
    """Maximum ratio of decompressed to stored bytes."""


class DecompressionLimit:
    """Limit on a file's decompressed bytes; without a limit, a file of a few kilobytes can expand to terabytes."""

    def __init__(self, file: RawFile) -> None:
        self.file, self.remaining = file, max(_UNLIMITED_BYTES, file.local.stat().st_size * file.max_ratio)

    def spend(self, count: int) -> None:
        """Count decompressed bytes. Raises InputError if the total exceeds the limit."""
        self.remaining -= count
        if self.remaining < 0:
            raise InputError(
                f"{self.file.name}: decompresses to more than {self.file.max_ratio:,} times its size; exclude it, or "
                "raise max_compression_ratio of its source if this is intended"
            )


def iter_lines(file: RawFile) -> Iterator[tuple[int, Part]]:
    """Yield line numbers, counted from 1, and lines without their line ends; skip blank lines.

    For a line longer than LONGEST_BYTES, None is yielded. Raises the same errors as `iter_chunks`.
    """
    return filter(lambda numbered: _is_wanted(numbered[1]), _split(file, _LINE_END, 1))


def iter_documents(file: RawFile, separator: str) -> Iterator[Part]:
    """Yield the documents of a text file without the separators between them; skip blank documents.

    A separator of n newlines matches n or more newlines, with Unix or Windows line ends. For a document longer than
    LONGEST_BYTES, None is yielded. Raises the same errors as `iter_chunks`.
    """
    are_newlines, num_bytes = not separator.strip("\n"), len(separator.encode())
    pattern = re.compile(rb"(?:\r?\n){%d,}" % num_bytes if are_newlines else re.escape(separator.encode()))

    def trim(numbered: tuple[int, Part]) -> Part:
        return numbered[1].strip(b"\r\n") if numbered[1] and are_newlines else numbered[1]

    return filter(_is_wanted, map(trim, _split(file, pattern, 2 * num_bytes)))


def _is_wanted(part: Part) -> bool:
    return part is None or (bool(part) and not part.isspace())


def _split(file: RawFile, pattern: re.Pattern[bytes], max_separator_bytes: int) -> Iterator[tuple[int, Part]]:
    """Yield the number, counted from 1, and the content of each part between separators.

    For a part longer than LONGEST_BYTES, None is yielded as its content.
    """
    # Each part is removed from the list before it is yielded, so that its memory can be freed early.
    tail, number, is_too_long = bytearray(), 1, False
    for chunk in iter_chunks(file):
        if pattern is _LINE_END and not tail and chunk.isspace():  # a fast path for millions of empty lines
            number += chunk.count(b"\n")
            continue
        start = max(0, len(tail) - max_separator_bytes)  # a separator may begin here and end in this chunk
        tail += chunk
        found = pattern.search(tail, start)
        is_too_long |= (found.start() if found else len(tail)) > LONGEST_BYTES
        if found:
            begin, end = found.span()
            found = None  # a match object locks the size of the buffer
            *others, last = pattern.split(bytes(tail[end:]))
            del tail[begin:]
            parts = [*others[::-1], None if is_too_long else tail]
            tail, is_too_long = bytearray(last), False
            while parts:
                yield number, parts.pop()
                number += 1
        elif is_too_long:
            del tail[:-max_separator_bytes]
    yield number, None if is_too_long else tail


def read_bytes(file: RawFile) -> bytearray | None:
    """Return all bytes of a file; None if the size exceeds LONGEST_BYTES. Raises the same errors as `iter_chunks`."""
    data = bytearray()
    for chunk in iter_chunks(file):
        data += chunk
        if len(data) > LONGEST_BYTES:
            return None
    return data


def open_text(file: RawFile) -> io.TextIOWrapper:
    """Open a file's decompressed bytes as text; bytes that are not UTF-8 become lone surrogates."""
    chunks = io.BufferedReader(_ChunkReader(iter_chunks(file)), CHUNK_BYTES)
    return io.TextIOWrapper(chunks, "utf-8", "surrogateescape", "")


class _ChunkReader(io.RawIOBase):
    """Raw file object over an iterator of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        """Return True, as the module `io` requires for a file that is open for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the next chunk; return the number of bytes, 0 at the end."""
        self._left = self._left or memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def iter_chunks(file: RawFile) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file, about a megabyte at a time, without a byte order mark at the beginning.

    Raises InputError if the file is an archive, if its compression is not the one that its name declares, or if the
    decompressed size exceeds `max_ratio`. Raises an error of READ_ERRORS if the file is truncated or damaged.
    """
    with file.local.open("rb") as raw:
        _check_compression(raw.read(_HEAD_BYTES), file)
    limit = DecompressionLimit(file)
    with pyarrow.OSFile(str(file.local)) as raw:
        chunks = decompress(raw, file.compression)
        if first := next(chunks, b""):
            _check_no_archive(first, file.name)
        for chunk in chain([first.removeprefix(codecs.BOM_UTF8)], chunks):
            limit.spend(len(chunk))
            if chunk:
                yield chunk


def _check_compression(head: bytes, file: RawFile) -> None:
    """Raise InputError if the first bytes of a file identify an archive or contradict the declared compression."""
    _check_no_archive(head, file.name)
    if file.compression and not head:
        raise InputError(f"{file.name}: empty; fetch it again or exclude it")
    found = next((name for name, magic in _COMPRESSIONS.items() if magic.match(head)), None)
    if found != file.compression:
        raise InputError(
            f"{file.name}: contains {found or _PLAIN}, but its name declares {file.compression or _PLAIN}; rename it, "
            "or fetch it again"
        )


def _check_no_archive(head: bytes, name: str) -> None:
    if archive := next((kind for kind, start, magic in _ARCHIVES if head.startswith(magic, start)), None):
        raise InputError(f"{name}: is a {archive} archive, which cannot be read; unpack it")


def decompress(raw: Any, compression: str | None) -> Iterator[bytes]:
    """Yield the decompressed bytes of an open pyarrow file, about a megabyte at a time."""
    if compression == "xz":
        yield from _decompress_xz(raw)
        return
    stream: Any = pyarrow.CompressedInputStream(raw, compression) if compression else raw
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _decompress_xz(raw: Any) -> Iterator[bytes]:
    """Yield the bytes of consecutive xz streams, with optional padding of zeros (section 2.2 of the format)."""
    data = raw.read(CHUNK_BYTES)
    while data:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_BYTES)
        while not stream.eof:
            if chunk := stream.decompress(data, CHUNK_BYTES):
                yield chunk
            data = raw.read(CHUNK_BYTES) if stream.needs_input and not stream.eof else b""
            if stream.needs_input and not data:
                raise EOFError("the xz stream is truncated")
        data = stream.unused_data.lstrip(b"\0")
        while not data and (more := raw.read(CHUNK_BYTES)):
            data = more.lstrip(b"\0")
