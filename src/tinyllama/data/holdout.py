"""Which documents are for validation: a document's content decides alone, so its copies fall on the same side."""

import hashlib

from tinyllama.text import Text, utf8_parts


def content_share(text: Text) -> float:
    """A number of [0, 1) that a text's UTF-8 bytes decide; even over many texts."""
    digest = hashlib.blake2b(digest_size=8)
    for part in utf8_parts(text):
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") / 2**64
