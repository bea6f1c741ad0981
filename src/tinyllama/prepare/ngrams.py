"""Texts as hashed runs of words, for finding near-equal documents and evaluation items.

Words are datatrove's, after its simplification (lower case; no punctuation, accents or numbers). A text is cut into
words a million characters at a time: a 200 MB document would otherwise need several gigabytes. The hash is SHA-1's
first 64 bits, for datatrove's other one, xxhash, would hold users to an old version of that package.
"""

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_PART_CHARACTERS = 1_000_000
_SPACE = re.compile(r"\s")


def hashed_ngrams(text: str, language: str, length_words: int) -> NDArray[np.uint64]:
    """The hash of every run of `length_words` words, in the text's order: uint64[words - length_words + 1]."""
    from datatrove.utils.hashes.sha1 import sha1_hash64  # noqa: PLC0415
    from datatrove.utils.text import ngrams  # noqa: PLC0415

    runs = ngrams(words(text, language), length_words)
    return np.fromiter((sha1_hash64(" ".join(run)) for run in runs), dtype=np.uint64)


def words(text: str, language: str) -> Iterator[str]:
    """The text's simplified words. Raises ValueError for a language without rules, ImportError where they need more."""
    from datatrove.utils.text import simplify_text  # noqa: PLC0415 - as the others here, part of the extra `clean`
    from datatrove.utils.word_tokenizers import load_word_tokenizer  # noqa: PLC0415

    tokenizer = load_word_tokenizer(language)
    for part in _parts(text):
        yield from tokenizer.word_tokenize(simplify_text(part))


def _parts(text: str) -> Iterator[str]:
    """The text cut where no word can be: before a space."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + _PART_CHARACTERS)
        end = space.start() if space else len(text)
        yield text[start:end]
        start = end
