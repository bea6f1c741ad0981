"""Text as a Python string or as its UTF-8 bytes, and how to go through a long one without a second copy.

As a string, a single emoji makes four bytes of every character; documents of many megabytes therefore stay bytes.
"""

from collections.abc import Iterator

Bytes = bytes | bytearray | memoryview
TextLike = str | Bytes

_PART = 1 << 20


def utf8_boundary_before(data: Bytes, place: int) -> int:
    """The last place up to `place` that is not inside a character's UTF-8 bytes."""
    while place and data[place] & 0xC0 == 0x80:
        place -= 1
    return place


def iter_utf8_chunks(text: TextLike, size: int = _PART) -> Iterator[bytes]:
    """A text's UTF-8 bytes in parts of `size` characters, of bytes `size` bytes; never cut inside a character."""
    if isinstance(text, str):
        for start in range(0, len(text), size):
            yield text[start : start + size].encode()
        return
    start = 0
    while start < len(text):
        end = _chunk_end(text, start, size)
        yield bytes(text[start:end])
        start = end


def to_str(text: TextLike) -> str:
    """A document as a Python string."""
    return text if isinstance(text, str) else str(text, "utf-8")


def is_utf8(data: memoryview) -> bool:
    """Whether bytes are UTF-8, found out a megabyte at a time."""
    start = 0
    while start < len(data):
        end = _chunk_end(data, start, _PART)
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
    return end if end > start else start + size  # not UTF-8, or a part smaller than a character
