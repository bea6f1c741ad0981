"""The known pre-tokenizers split both parts of a text as the complete text, at each place of `Cuts`."""

import json
import random
from itertools import pairwise, product
from typing import Any

import pytest
import tokenizers
from tests.vocabularies import byte_level_document, every_byte_level

from tinyllama.tokenizer.cuts import Cuts

CHARACTERS = "alsé日7٣½=-'\u2019.😀 \n\r\t\u3000\x85\x1c\u180e\u200b\u0301\u0378"
"""Characters of each class, those of contractions, and some whose class is not obvious or not certain."""
MARGIN = 8


def boundaries_of(pre_tokenizer: Any, text: str) -> set[int]:
    return {end for _, (_, end) in pre_tokenizer.pre_tokenize_str(text)}


def check_cuts(name: str, texts: list[str]) -> int:
    """Compare the boundaries of pretokens of the text and of its parts; return the number of cuts."""
    pre_tokenizer, num_cuts = tokenizers.Tokenizer.from_str(json.dumps(byte_level_document(name))).pre_tokenizer, 0
    for text in texts:
        expected = boundaries_of(pre_tokenizer, text)
        for place in filter(Cuts(text).__contains__, range(len(text), 0, -1)):
            num_cuts += 1
            after = {place + end for end in boundaries_of(pre_tokenizer, text[place:])}
            assert after == {end for end in expected if end > place}, (text, place)
            before = {end for end in boundaries_of(pre_tokenizer, text[:place]) if end < place - MARGIN}
            assert before == {end for end in expected if end < place - MARGIN}, (text, place)
    return num_cuts


@every_byte_level
def test_short_texts_are_split_alike(name: str) -> None:
    assert check_cuts(name, ["".join(text) for text in product("al1=' \n\t", repeat=4)]) > 5000


@every_byte_level
def test_runs_are_split_alike(name: str) -> None:
    generator = random.Random(1)
    texts = [
        "".join(generator.choice(CHARACTERS) * generator.choice((1, 1, 2, 3, 14)) for _ in range(12))
        for _ in range(1500)
    ]
    assert check_cuts(name, texts) > 10_000


@pytest.mark.parametrize("text", ["=", "7", "\n", " ", "a1", "= ", "1 ", "-a", "=\n", "-1", "\r\n", "日。", "😀"])
def test_repeated_text_has_cuts(text: str) -> None:
    places = list(filter(Cuts(text * 100).__contains__, range(1, 100)))
    assert max(next_place - place for place, next_place in pairwise(places)) <= 3
