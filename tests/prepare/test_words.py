"""Text splits into words in every script."""

import pytest

from tinyllama.prepare.words import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 1.5 km — “far”, snake_case!\n", "It s 1 5 km far snake case"),
        ("Straße, naïve, nai\u0308ve", "Straße naïve nai\u0308ve"),
        ("Привет, мир; γδλ; 안녕 세상", "Привет мир γδλ 안녕 세상"),
        ("हिन्दी में। שָׁלוֹם مَرْحَبًا", "हिन्दी में שָׁלוֹם مَرْحَبًا"),
        ("我们去北京。東京タワー、x86。", "我 们 去 北 京 東 京 タ ワ ー x86"),
        ("ไทย a", "ไ ท ย a"),
        ("… -- ??", ""),
    ],
    ids=["english", "diacritics", "alphabets", "marks", "chinese and japanese", "thai", "punctuation"],
)
def test_words_are_runs_of_letters_and_digits_or_single_characters(text: str, expected: str) -> None:
    assert words(text) == expected.split()
