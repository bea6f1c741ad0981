"""Bound on how much longer a tokenizer makes a text: a hostile one could turn each letter into a gigabyte."""

import base64
import math
from typing import Any

from tinyllama.errors import InputError

_MOST = 32
"""The normalisation forms of Unicode lengthen a character 18 times at most (unicode.org, UAX 15)."""


def check_expansion(name: str, document: dict[str, Any]) -> None:
    """Raise InputError where the normalizer or the decoder could make a text more than _MOST times as long."""
    for part in ("normalizer", "decoder"):
        if _factor(document.get(part)) > _MOST:
            raise InputError(
                f"{name}: its {part} can make a text more than {_MOST} times as long; use a tokenizer without that"
            )


def _factor(step: Any) -> float:
    """Return how many characters a step can make of one."""
    match step:
        case {"normalizers": list() as steps} | {"decoders": list() as steps}:
            return math.prod(map(_factor, steps))
        case {"type": "Replace", "content": str() as content, "pattern": {"String": str() as found}}:
            return max(1.0, len(content) / max(1, len(found)))
        case {"type": "Replace", "content": str() as text} | {"type": "Prepend", "prepend": str() as text}:
            return max(1.0, len(text))
        case {"type": "Precompiled", "precompiled_charsmap": str() as charsmap}:
            return _longest_replacement(base64.b64decode(charsmap, validate=True))
    return 1.0


def check_charsmap(name: str, charsmap: bytes) -> None:
    """Raise InputError where SentencePiece's map of normalisation rules makes a text more than _MOST times as long."""
    if charsmap and _longest_replacement(charsmap) > _MOST:
        raise InputError(
            f"{name}: its normalisation rules can make a text more than {_MOST} times as long; use another tokenizer"
        )


def _longest_replacement(charsmap: bytes) -> float:
    """Return the characters of the longest replacement in SentencePiece's compiled map of normalisation rules.

    Its layout: the bytes of a trie, as an integer of four bytes; the trie; the replacements, each ended by a NUL
    (sentencepiece/src/normalizer.cc).
    """
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
    return max(1.0, *(len(text.decode(errors="replace")) for text in texts))
