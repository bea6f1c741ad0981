"""Hashes of the n-grams of words, which deduplication and decontamination compare.

Words are compared in lower case, without accents, and with 0 in place of each number.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tinyllama.prepare.words import words_in_parts

_DIGITS = re.compile(r"\d+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Factor of hashes of sequences: 2^64 / golden ratio, as in Fibonacci hashing. It is odd, so that the product modulo
2^64 loses no information."""
_MAX_CACHED_WORDS, _MAX_CACHED_CHARACTERS = 1 << 18, 100


def hashed_ngrams(text: str, length_words: int) -> Iterator[NDArray[np.uint64]]:
    """Yield the hash of each n-gram of `length_words` words in order, in arrays that each take little memory."""
    preceding = np.empty(0, np.uint64)
    for words in words_in_parts(text):
        own = np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))
        hashes = np.concatenate([preceding, own])
        count = max(0, len(hashes) - length_words + 1)
        ngrams = np.zeros(count, np.uint64)
        for place in range(length_words if count else 0):
            ngrams *= MULTIPLIER
            ngrams += hashes[place : place + count]
        yield ngrams
        preceding = hashes[count:]


class _WordHashes(dict[str, int]):
    """64-bit BLAKE2b hash of each word; a bounded number of words is cached."""

    def __missing__(self, word: str) -> int:
        plain = _DIGITS.sub("0", word)
        if not plain.isascii():
            plain = "".join(char for char in unicodedata.normalize("NFD", plain) if unicodedata.category(char) != "Mn")
        found = int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")
        if len(word) <= _MAX_CACHED_CHARACTERS:
            if len(self) >= _MAX_CACHED_WORDS:
                self.clear()
            self[word] = found
        return found


_word_hashes = _WordHashes()
