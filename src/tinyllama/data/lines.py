"""The lines of a plain, gzip or zstd file, of any length, in bounded memory.

Reads through arrow's streams: they check where a gzip member or zstd frame ends, while zstandard's own reader ends
without a word where a frame is cut off, and they hand out little at a time however much a few bytes unpack to.
"""

import codecs
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow

from tinyllama.errors import InputError

_CHUNK_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 1 << 30
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_PLAIN = "plain text"


def lines_of(local: Path, name: str) -> Iterator[bytes | bytearray]:
    """Lines of a file without their ends, blank ones left out. How it is packed follows from its `name`'s ending.

    Raises InputError where its bytes say otherwise or a line passes 1 GiB, OSError where it is cut off.
    """
    # One buffer grows with a long line, so that its pieces are not there beside it; popped, a line is not held on here.
    tail = bytearray()
    for place, chunk in enumerate(chain(_chunks(local, name), [b"\n"])):
        first, *rest = (chunk if place else chunk.removeprefix(codecs.BOM_UTF8)).split(b"\n")
        tail += first
        if len(tail) > _LONGEST_LINE_BYTES:  # a JSON array of gigabytes, say, which memory may not hold
            raise InputError(f"{name}: a line of more than 1 GiB; write one JSON object a line")
        if rest:
            lines: list[bytes | bytearray] = [*rest[-2::-1], tail]
            whole = [line for line in lines if _holds_something(line)]
            del lines
            tail = bytearray(rest[-1])
            while whole:
                yield whole.pop()


def _holds_something(line: bytes | bytearray) -> bool:
    return bool(line) and not line.isspace()


def _chunks(local: Path, name: str) -> Iterator[bytes]:
    if not local.stat().st_size and Path(name).suffix in _CODECS:
        raise InputError(f"{name}: is empty; fetch it again or take it out")
    expected, found = _CODECS.get(Path(name).suffix, _PLAIN), _packing(local)
    if found != expected:
        raise InputError(f"{name}: holds {found}, not {expected} as its name says; rename it, or fetch it again")
    with pyarrow.OSFile(str(local)) as raw:
        stream: Any = raw if expected == _PLAIN else pyarrow.CompressedInputStream(raw, expected)
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _packing(local: Path) -> str:
    with local.open("rb") as file:
        head = file.read(4)
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    # A frame of zstd's own, or one that readers skip, which parallel packers put first.
    if head == b"\x28\xb5\x2f\xfd" or (head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    return _PLAIN
