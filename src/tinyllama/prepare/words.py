"""Split of text into words by a regular expression, for all languages, without a model of any language.

A word is a run of letters, digits and combining marks. In the scripts of Chinese, Japanese, Thai, Lao, Tibetan, Burmese
and Khmer, which have no spaces between words, each character is a word.
"""

import re
from collections.abc import Iterator

# Python's \w lacks the combining marks: diacritics, Hebrew and Arabic points, and the vowel signs of Indian scripts.
_MARKS = r"\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
_UNSPACED = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan; Burmese; Khmer
    r"\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNSPACED_CHARACTER = re.compile(rf"([{_UNSPACED}])")
_OTHER_SEPARATOR = re.compile(rf"[^\x00-\x7f\w{_MARKS}]")
_BOUNDARY = re.compile(rf"(?![{_MARKS}])[\W_{_UNSPACED}]")
_ASCII_SEPARATORS = bytes(code if code > 127 or chr(code).isalnum() else ord(" ") for code in range(256))
"""Table that replaces each byte of an ASCII separator by a space, and keeps the bytes of all other characters."""
_PART_CHARACTERS = 1 << 20
"""Number of characters that are split at a time; the words of a complete document of 200 MB would need gigabytes. A
longer word, such as encoded binary data, may be cut."""


def words(text: str) -> list[str]:
    """Return the words of a text in order, without punctuation and symbols."""
    text = text.encode().translate(_ASCII_SEPARATORS).decode()  # many times faster than a regular expression
    if not text.isascii():
        text = _OTHER_SEPARATOR.sub(" ", text)
        text = " ".join(_UNSPACED_CHARACTER.split(text))
    return text.split()


def words_in_parts(text: str) -> Iterator[list[str]]:
    """Yield the words of a text in lower case, in lists that each take little memory."""
    start = 0
    while start < len(text):
        last = start + 2 * _PART_CHARACTERS
        boundary = _BOUNDARY.search(text, start + _PART_CHARACTERS, last)
        end = boundary.start() if boundary else last
        yield words(text[start:end].lower())
        start = end
