"""Functions that read a text, a Python string or UTF-8 bytes, in chunks without copying the entire text.

Long documents remain bytes, because one emoji makes a Python string use four bytes per character.
"""

import hashlib
from collections.abc import Iterator

Bytes = bytes | bytearray | memoryview
TextLike = str | Bytes

_CHUNK_SIZE = 1 << 20


def utf8_boundary_before(data: Bytes, position: int) -> int:
    """Return the last character boundary at or before `position`."""
    while position and data[position] & 0xC0 == 0x80:
        position -= 1
    return position


def iter_utf8_chunks(text: TextLike, size: int = _CHUNK_SIZE) -> Iterator[bytes]:
    """Yield the UTF-8 bytes of a text in chunks, none of which ends inside a character.

    If the text is a `str`, a chunk has at most `size` characters. Otherwise, a chunk has at most `size` bytes.
    """
    if isinstance(text, str):
        for start in range(0, len(text), size):
            yield text[start : start + size].encode()
        return
    start = 0
    while start < len(text):
        end = _chunk_end(text, start, size)
        yield bytes(text[start:end])
        start = end


def hash_text(text: TextLike) -> bytes:
    """Return the 64-bit BLAKE2b hash of a text's UTF-8 bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for chunk in iter_utf8_chunks(text):
        digest.update(chunk)
    return digest.digest()


def to_str(text: TextLike) -> str:
    """Return a document as a Python string."""
    return text if isinstance(text, str) else str(text, "utf-8")


def is_utf8(data: memoryview) -> bool:
    """Return whether the data is valid UTF-8; decode 1 MiB at a time."""
    start = 0
    while start < len(data):
        end = _chunk_end(data, start, _CHUNK_SIZE)
        try:
            str(data[start:end], "utf-8")
        except UnicodeDecodeError:
            return False
        start = end
    return True


def _chunk_end(data: Bytes, start: int, size: int) -> int:
    if start + size >= len(data):
        return len(data)
    end = utf8_boundary_before(data, start + size)
    return end if end > start else start + size  # `end` equals `start` for text that is not UTF-8 and for a tiny `size`
