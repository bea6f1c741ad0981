"""Split of text into words by a regular expression, for all languages, without a model of any language.

A word is a run of letters, digits and combining marks. In the scripts of Chinese, Japanese, Thai, Lao, Tibetan, Burmese
and Khmer, which have no spaces between words, each character is a word.
"""

import re

# Python's \w lacks the combining marks: diacritics, Hebrew and Arabic points, and the vowel signs of Indian scripts.
_MARKS = r"\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
_UNSPACED = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan; Burmese; Khmer
    r"\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[^\W_{_UNSPACED}]+(?:[{_MARKS}][^\W_{_UNSPACED}]*)*|[{_UNSPACED}]")


def words(text: str) -> list[str]:
    """Return the words of a text in order, without punctuation and symbols."""
    return _WORD.findall(text)
