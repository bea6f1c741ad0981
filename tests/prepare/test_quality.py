"""The shortcuts decide as datatrove's filters do; words and sentences are close to those of spaCy."""

from pydoc_data.topics import topics
from typing import Any

import pytest

pytest.importorskip("regex", reason="the extra `clean` is not installed")

from datatrove.data import Document
from datatrove.pipeline import filters
from hypothesis import given
from hypothesis import strategies as st
from tests.prepare.cleaning import prose

from tinyllama.prepare.quality import quality_check, word_tokenizer
from tinyllama.recipe import Cleaning

ENGLISH = word_tokenizer("en")
PEERS = {
    "gopher_repetition": filters.GopherRepetitionFilter(language=ENGLISH),
    "gopher_quality": filters.GopherQualityFilter(language=ENGLISH),
    "c4": filters.C4QualityFilter(language=ENGLISH),
    "fineweb": filters.FineWebQualityFilter(language=ENGLISH),
}
CHECKS = {name: quality_check(name, Cleaning()) for name in PEERS}


def decisions(name: str, text: str) -> list[tuple[Any, str | None]]:
    """Return the drop reason and the kept text of datatrove's filter and of ours."""
    peer, own = Document(text, "peer"), Document(text, "own")
    result, reason = PEERS[name].filter(peer), CHECKS[name](own)
    return [
        (None if result is True else result[1], peer.text if result is True else None),
        (reason, None if reason else own.text),
    ]


@pytest.mark.parametrize("name", list(PEERS))
def test_real_text_is_decided_as_by_datatrove(name: str) -> None:
    texts = [*topics.values(), *(prose(seed) for seed in range(20)), *(prose(1, 1) * count for count in range(2, 9))]
    found = [decisions(name, text) for text in texts]
    assert all(peer == own for peer, own in found)
    assert len({own[0] for _, own in found}) > 1  # some are kept and some dropped


PARTS = st.sampled_from(
    ["the", "of", "that", "word", "x", "7", "# ", "...", "…", "-", "• item", ". ", "\n", "\n\n", "{", "javascript", " "]
)


@pytest.mark.parametrize("name", list(PEERS))
@given(st.lists(PARTS, min_size=1, max_size=30), st.integers(1, 40))
def test_any_text_is_decided_as_by_datatrove(name: str, parts: list[str], copies: int) -> None:
    text = " ".join(parts * copies)
    if not (text.strip() and text.replace("\n", "").strip()):
        return  # datatrove divides by zero
    peer, own = decisions(name, text)
    assert peer == own


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's well-known (and/or not).", "It 's well - known ( and / or not ) ."),
        ("x_y = f(3.14), 1,000... see https://a.org/b?c=d.", "x_y = f(3.14 ) , 1,000 ... see https://a.org/b?c=d ."),
        ("End.Next «Привет, мир» naïve", "End . Next « Привет , мир » naïve"),
        ("-- \n\t ", "--"),
    ],
    ids=["english", "signs", "scripts", "spaces"],
)
def test_words_include_punctuation(text: str, words: str) -> None:
    assert ENGLISH.word_tokenize(text) == words.split()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("He said “stop.” Then he left", 2),
        ("J. Smith, e.g. this one ... and more", 1),
        ("A full stop without a space.Another sentence, version 3.14.", 2),
        ("यह एक वाक्य है। यह दूसरा है।", 2),
        ("  ", 0),
        ("", 0),
    ],
)
def test_sentences_end_with_punctuation(text: str, count: int) -> None:
    spans = ENGLISH.span_tokenize(text)
    assert len(spans) == len(ENGLISH.sent_tokenize(text)) == count
    assert "".join(ENGLISH.sent_tokenize(text)).strip() == (text.strip() if count else "")


def test_languages_without_spaces_use_the_splitters_of_datatrove() -> None:
    assert {type(word_tokenizer(language)) for language in ("de", "ko", "ms", "tl")} == {type(ENGLISH)}
    for language, package in (("th", "pythainlp"), ("zh", "spacy|jieba"), ("yue", "spacy|jieba"), ("my", "pyidaungsu")):
        with pytest.raises(ImportError, match=package):
            word_tokenizer(language)
    with pytest.raises(ValueError, match="unknown"):
        word_tokenizer("english")
