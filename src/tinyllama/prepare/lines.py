"""The lines and documents of a plain or packed file, of any length, in bounded memory.

Reads through arrow's streams: they check where a gzip member or zstd frame ends, while zstandard's own reader ends
without a word where a frame is cut off, and they hand out little at a time however much a few bytes unpack to. Arrow
has no xz; Python's `LZMAFile` skips what follows a stream if it is damaged, so its decompressor is used directly.
"""

import codecs
import io
import lzma
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow

from tinyllama.errors import InputError
from tinyllama.prepare.endings import packing_of
from tinyllama.prepare.large_strings import LONGEST_BYTES

_CHUNK_BYTES = 1 << 20
_XZ_BYTES = 256 << 20  # of memory; the largest preset, 9, needs 65 MiB
_PLAIN = "plain text"
_HEAD_BYTES = 512
_ARCHIVES = (
    ("zip", 0, b"PK\3\4"),
    ("7z", 0, b"7z\xbc\xaf\x27\x1c"),
    ("lz4", 0, b"\x04\x22\x4d\x18"),
    ("tar", 257, b"ustar"),
)
"""Name of each kind of archive, and the bytes that identify it, with their offset."""
_BZ2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")


def iter_lines(local: Path, name: str, ratio: int) -> Iterator[tuple[int, bytes | bytearray | None]]:
    """Yield the lines of a file with their numbers from 1, without their ends; skip blank ones.

    A line of more than LONGEST_BYTES is None. Raises as `chunks_of` does.
    """
    # One buffer grows with a long line, so that its pieces are not there beside it; popped, a line is not held on here.
    tail, number, is_too_long = bytearray(), 1, False
    for chunk in chain(chunks_of(local, name, ratio), [b"\n"]):
        if not tail and chunk.isspace():  # a flood of empty lines costs one count per chunk
            number += chunk.count(b"\n")
            continue
        first, *rest = chunk.split(b"\n")
        tail += first
        if len(tail) > LONGEST_BYTES:
            tail, is_too_long = bytearray(b"..."), True
        if rest:
            lines: list[bytes | bytearray] = [*rest[-2::-1], tail]
            number += len(lines)
            whole: list[tuple[int, bytes | bytearray | None]] = [
                (number - left, line) for left, line in enumerate(lines, 1) if _is_nonblank(line)
            ]
            if is_too_long:
                whole[-1] = whole[-1][0], None
            del lines
            tail, is_too_long = bytearray(rest[-1]), False
            while whole:
                yield whole.pop()


def _is_nonblank(line: bytes | bytearray) -> bool:
    return bool(line) and not line.isspace()


def documents_of(local: Path, name: str, separator: str, ratio: int) -> Iterator[bytes | bytearray | None]:
    """Yield the documents of a text file, without the separators between them; skip blank ones.

    A separator of line ends alone matches that many or more, of Unix or Windows. A document of more than LONGEST_BYTES
    is None. Raises as `chunks_of` does.
    """
    are_lines = not separator.strip("\n")
    pattern = re.compile(rb"(?:\r?\n){%d,}" % len(separator) if are_lines else re.escape(separator.encode()))
    reach = 2 * len(separator.encode())

    def trimmed(document: Any) -> Any:
        return document.strip(b"\r\n") if are_lines else document

    tail, is_too_long = bytearray(), False
    for chunk in chunks_of(local, name, ratio):
        start = max(0, len(tail) - reach)  # where a separator may begin that this chunk ends
        tail += chunk
        found = pattern.search(tail, start)
        if len(tail) > LONGEST_BYTES and not found:
            del tail[:-reach]
            is_too_long = True
        if found:
            begin, end = found.span()
            found = None  # a match keeps the buffer from changing its size
            *others, last = pattern.split(bytes(tail[end:]))
            del tail[begin:]
            whole = [document for document in map(trimmed, others[::-1]) if _is_nonblank(document)]
            if is_too_long:
                whole.append(None)
            elif _is_nonblank(tail := trimmed(tail)):
                whole.append(tail)
            tail, is_too_long = bytearray(last), False
            while whole:  # as in `iter_lines`
                yield whole.pop()
    if is_too_long:
        yield None
    elif _is_nonblank(tail := trimmed(tail)):
        yield tail


def chunks_of(local: Path, name: str, ratio: int) -> Iterator[bytes]:
    """Yield a file's bytes, unpacked, about a megabyte at a time, without a byte order mark at the beginning.

    Raises InputError where it is not packed as the ending of `name` requires, or unpacks to more than `ratio` times
    its size; OSError, EOFError or LZMAError where it is cut off or damaged.
    """
    with local.open("rb") as file:
        check_packing(file.read(_HEAD_BYTES), name)
    with pyarrow.OSFile(str(local)) as raw:
        chunks = _without_mark(unpacked(raw, packing_of(name)), name)
        if not packing_of(name):
            yield from chunks
            return
        budget = Budget(local, name, ratio)
        for chunk in chunks:
            budget.spend(len(chunk))
            yield chunk


_FREE_BYTES = 64 << 20
"""Unpacked bytes that any file may have."""


class Budget:
    """Number of bytes that a file may still unpack to: a few kilobytes can hold terabytes of one letter."""

    def __init__(self, local: Path, name: str, ratio: int) -> None:
        self.name, self.ratio, self.left = name, ratio, max(_FREE_BYTES, local.stat().st_size * ratio)

    def spend(self, count: int) -> None:
        """Count unpacked bytes. Raises InputError where they are too many."""
        self.left -= count
        if self.left < 0:
            raise InputError(
                f"{self.name}: unpacks to more than {self.ratio:,} times its size; if it is meant to, raise its "
                "source's max_compression_ratio, or take it out"
            )


def whole_file(local: Path, name: str, ratio: int) -> bytes | bytearray | None:
    """Return the bytes of `chunks_of`, all at once; None if they are more than LONGEST_BYTES."""
    if packing_of(name):
        data = bytearray()
        for chunk in chunks_of(local, name, ratio):
            data += chunk
            if len(data) > LONGEST_BYTES:
                return None
        return data
    with local.open("rb") as file:
        plain = file.read(LONGEST_BYTES + 1)
    check_packing(plain[:_HEAD_BYTES], name)
    return None if len(plain) > LONGEST_BYTES else plain.removeprefix(codecs.BOM_UTF8)


def check_packing(head: bytes, name: str) -> None:
    """Raise InputError where a file's first bytes are an archive's, or not packed as the ending of `name` requires."""
    _refuse_archive(head, name)
    wanted, found = packing_of(name), _detect_compression(head)
    if wanted and not head:
        raise InputError(f"{name}: is empty; fetch it again or take it out")
    if found != wanted:
        raise InputError(
            f"{name}: holds {found or _PLAIN}, not {wanted or _PLAIN} as its name says; rename it, or fetch it again"
        )


def _refuse_archive(head: bytes, name: str) -> None:
    if archive := next((kind for kind, place, mark in _ARCHIVES if head[place:].startswith(mark)), None):
        raise InputError(f"{name}: is a {archive} archive, which is not read; unpack it")


def _without_mark(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    for first in chunks:
        _refuse_archive(first[:_HEAD_BYTES], name)
        yield first.removeprefix(codecs.BOM_UTF8)
        break
    yield from chunks


def unpacked(raw: Any, packing: str | None) -> Iterator[bytes]:
    """Yield the bytes of an open pyarrow file, unpacked, about a megabyte at a time."""
    if packing == "xz":
        yield from _without_xz(raw)
        return
    stream: Any = pyarrow.CompressedInputStream(raw, packing) if packing else raw
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _without_xz(raw: Any) -> Iterator[bytes]:
    """Yield the bytes of consecutive xz streams; zeros may separate them (the format's section 2.2)."""
    data = raw.read(_CHUNK_BYTES)
    while data:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_BYTES)
        while not stream.eof:
            if chunk := stream.decompress(data, _CHUNK_BYTES):
                yield chunk
            data = raw.read(_CHUNK_BYTES) if stream.needs_input and not stream.eof else b""
            if stream.needs_input and not data:
                raise EOFError("the xz stream is cut off")
        data = stream.unused_data.lstrip(b"\0")
        while not data and (more := raw.read(_CHUNK_BYTES)):
            data = more.lstrip(b"\0")


def _detect_compression(head: bytes) -> str | None:
    """Return the packing of a file that begins with these bytes; None where it is not packed."""
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    # A frame of zstd's own, or one that readers skip, which parallel packers put first.
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    if _BZ2.match(head):
        return "bz2"
    return "xz" if head[:6] == b"\xfd7zXZ\0" else None


def opened_text(local: Path, name: str, ratio: int) -> io.TextIOWrapper:
    """Open the bytes of `chunks_of` as text; bytes that are not UTF-8 become lone surrogates."""
    if packing_of(name):
        chunks = io.BufferedReader(_Stream(chunks_of(local, name, ratio)))
        return io.TextIOWrapper(chunks, "utf-8", "surrogateescape", "")
    with local.open("rb") as file:
        check_packing(file.read(_HEAD_BYTES), name)
    return local.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


class _Stream(io.RawIOBase):
    """Chunks of bytes as an open file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        """Return True, as io requires of a file that is open for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the next chunk; return the number of bytes, 0 at the end."""
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count
