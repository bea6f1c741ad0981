"""Which documents are for validation: a document's content decides alone, so its copies fall on the same side."""

import hashlib
from collections.abc import Iterator

_PART_CHARACTERS = 1 << 20


def content_share(text: str) -> float:
    """A number of [0, 1) that a text's UTF-8 bytes decide; even over many texts."""
    digest = hashlib.blake2b(digest_size=8)
    for part in utf8_parts(text):
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") / 2**64


def utf8_parts(text: str) -> Iterator[bytes]:
    """A text's UTF-8 bytes, at most a few megabytes at a time: a long text is never there twice."""
    if len(text) <= _PART_CHARACTERS:
        yield text.encode()
        return
    for start in range(0, len(text), _PART_CHARACTERS):
        yield text[start : start + _PART_CHARACTERS].encode()
