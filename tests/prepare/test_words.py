"""Text splits into words in every script."""

from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama.prepare import words as words_module
from tinyllama.prepare.words import words, words_in_parts


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


@given(st.text())
def test_each_letter_and_digit_is_part_of_a_word(text: str) -> None:
    def alphanumeric(text: str) -> str:
        return "".join(filter(str.isalnum, text))

    assert alphanumeric("".join(words(text))) == alphanumeric(text)
    assert all(any(map(str.isalnum, word)) or not word.isascii() for word in words(text))


def test_words_of_a_text_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(topics.values())[:20_000] + " ÄÉ\u0301 1,5\u20032\n\n \u2019s 北京市\u3002 don't e.g. IS_ALPHA"
    monkeypatch.setattr(words_module, "_PART_CHARACTERS", 40)
    assert [word for part in words_in_parts(text) for word in part] == words(text.lower())
    assert list(words_in_parts("x" * 70)) == [["x" * 70]]
    assert list(words_in_parts("x" * 100 + " y")) == [["x" * 80], ["x" * 20, "y"]]  # this bounds the memory
