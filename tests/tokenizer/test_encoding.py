"""Token ids equal SentencePiece's: for real text, every character, random text, and texts in one block."""

import random
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import python_sources
from tests.vocabularies import (
    EDGE_CASES,
    LLAMA2,
    every_vocabulary,
    from_json,
    from_model,
    reference,
    sentencepiece_backend,
    tokenizers_reference,
    train_sentencepiece,
    with_tiny_memo,
)

from tinyllama.errors import InputError
from tinyllama.prepare.corpus import CorpusSizes
from tinyllama.prepare.readers import RejectedRow, SourceRow, read_rows
from tinyllama.prepare.sources import list_files
from tinyllama.recipe import Source
from tinyllama.text import to_str
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import HuggingFaceBackend, SentencePieceBackend
from tinyllama.tokenizer.memo import Limits

pytestmark = pytest.mark.slow

CORPUS = ("slimpajama", "starcoderdata")
runs = st.builds(lambda character, count: character * count, st.sampled_from(" \n\t▁\0"), st.integers(1, 300))
edge_case_texts = st.lists(st.sampled_from(EDGE_CASES) | runs | st.text(max_size=8), max_size=8).map("".join)


def encode_together(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_documents(texts, bos=False, eos=False)]


def rows_in(folder: Path, name: str) -> Iterator[SourceRow | RejectedRow]:
    source = Source(format=name, path=str(folder / name), weight=1)
    for file in list_files(name, source):
        yield from read_rows(file.path, source)


@every_vocabulary
@pytest.mark.parametrize("build", [from_model, from_json, with_tiny_memo])
def test_ids_and_text_equal_sentencepiece(name: str, build: Any) -> None:
    tokenizer, theirs = build(name), reference(name)
    for text in [*EDGE_CASES, " ".join(EDGE_CASES), "".join(EDGE_CASES), *python_sources(40)[30:]]:
        ids = theirs.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids) == text.replace("▁", " ")


@every_vocabulary
@settings(deadline=None, max_examples=150)
@given(texts=st.lists(edge_case_texts, max_size=8), block_bytes=st.sampled_from([1, 7, 40, 1 << 17]))
def test_texts_of_one_block_do_not_change_each_other(name: str, texts: list[str], block_bytes: int) -> None:
    expected = [reference(name).encode(text) for text in texts]
    fresh = Tokenizer(sentencepiece_backend(name), Limits(3000, 4, 6, block_bytes))
    for tokenizer in (fresh, from_model(name), from_json(name)):
        assert encode_together(tokenizer, texts) == [tokenizer.encode(text) for text in texts] == expected


@every_vocabulary
def test_every_unicode_character_has_sentencepiece_ids(name: str) -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    blocks = [characters[start : start + 5000] for start in range(0, len(characters), 5000)]
    texts = ["".join(block) for block in blocks] + [" a".join(block[::3]) for block in blocks]
    for tokenizer in (from_model(name), from_json(name)):
        assert encode_together(tokenizer, texts) == [reference(name).encode(text) for text in texts]


@pytest.mark.parametrize("name", ["llama2" if LLAMA2.is_file() else "small"])
def test_embedded_corpus_has_sentencepiece_ids(name: str, embedded_corpora: tuple[Path, Path, CorpusSizes]) -> None:
    texts = [
        to_str(row.text)
        for source in CORPUS
        for row in rows_in(embedded_corpora[0], source)
        if isinstance(row, SourceRow)
    ]
    assert sum(map(len, texts)) > 40_000_000
    for text, ids in zip(texts, from_model(name).encode_documents(texts, bos=False, eos=False), strict=True):
        assert ids.tolist() == reference(name).encode(text)


@every_vocabulary
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_tokens_in_any_order_have_sentencepiece_ids(name: str, data: st.DataObject) -> None:
    pieces = st.integers(0, reference(name).vocab_size() - 1).map(reference(name).id_to_piece)
    text = "".join(data.draw(st.lists(pieces | st.sampled_from([" ", "  ", "\n", "1"]), max_size=30)))
    assert with_tiny_memo(name).encode(text) == from_json(name).encode(text) == reference(name).encode(text)


@every_vocabulary
@settings(deadline=None, max_examples=60)
@given(text=edge_case_texts)
def test_bytes_have_the_ids_of_the_string(name: str, text: str) -> None:
    build = with_tiny_memo(name)
    wanted = build.encode_array(text).tolist()
    for kind in (text.encode(), bytearray(text.encode())):
        assert build.encode_array(kind).tolist() == wanted


if LLAMA2.is_file():

    def test_llama_2_has_its_published_ids() -> None:
        assert from_model("llama2").encode("Hello world  foo") == [15043, 3186, 29871, 7953]
        assert (from_model("llama2").bos_id, from_model("llama2").eos_id, from_model("llama2").unk_id) == (1, 2, 0)


def test_long_text_needs_little_more_memory_than_its_ids() -> None:
    text = "".join(python_sources(20)) * 40
    tokenizer = from_model("small")
    tokenizer.encode(text[:1_000_000])
    tracemalloc.start()
    num_bytes = tokenizer.encode_array(text).nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) > 15_000_000
    assert peak < 2 * num_bytes + 12_000_000


def test_texts_are_read_from_an_iterator_in_blocks() -> None:
    texts = [f"text number {number} " * 50 for number in range(2000)]
    taken = 0

    def counted() -> Iterator[str]:
        nonlocal taken
        for text in texts:
            taken += len(text)
            yield text

    given = 0
    for text, ids in zip(texts, from_model("small").encode_documents(counted()), strict=True):
        given += len(text)
        assert len(ids) > 100
        assert taken - given < 300_000
    assert given == taken > 1_500_000


@pytest.mark.parametrize("build", [from_model, from_json])
def test_lone_surrogate_is_refused_with_its_position(build: Any) -> None:
    plain = Tokenizer(SentencePieceBackend("plain", train_sentencepiece(split_by_whitespace=False)))
    for tokenizer in (build("small"), plain):
        with pytest.raises(InputError, match=r"U\+D83D at character 100002"):
            tokenizer.encode("ab " * 33334 + "\ud83d end")


@pytest.mark.parametrize(
    ("options", "has_memo"),
    [
        ({"split_by_whitespace": False}, False),  # tokens such as `in▁the`
        ({"byte_fallback": False}, False),  # adjacent unknown characters share one <unk>
        ({"normalization_rule_name": "nmt_nfkc"}, False),
        ({"remove_extra_whitespaces": True}, False),
        ({"add_dummy_prefix": False}, False),
        ({"treat_whitespace_as_suffix": True}, False),
        ({"split_digits": False, "split_by_number": False, "split_by_unicode_script": False}, True),  # longer pretokens
        ({"user_defined_symbols": ["<|fim|>", "->"]}, True),
        ({"user_defined_symbols": [":\n", "\nx", "\n\n"]}, True),  # no split point at newlines
    ],
)
def test_other_vocabularies_are_exact_with_or_without_memo(options: dict[str, Any], has_memo: bool) -> None:
    model = train_sentencepiece(**options)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer(SentencePieceBackend("other", model), Limits(block_bytes=50))
    assert (tokenizer._memo is not None) == has_memo
    texts = [*EDGE_CASES, " ".join(EDGE_CASES), "x <|fim|> y->z <|fim|>", "if x:\n\nx\n:\n", python_sources(31)[30]]
    encoded = [theirs.encode(text) for text in texts]
    assert encode_together(tokenizer, texts) == encoded
    for text, ids in zip(texts, encoded, strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids)


def test_tokens_across_words_are_exact_without_memo() -> None:
    document = SentencePieceBackend("crossing", train_sentencepiece(split_by_whitespace=False)).to_tokenizer_json()
    tokenizer, theirs = Tokenizer(HuggingFaceBackend("crossing", document, {})), tokenizers_reference(document)
    assert tokenizer._memo is None
    for text in [*EDGE_CASES, python_sources(31)[30]]:
        assert tokenizer.encode(text) == theirs.encode(text).ids


@every_vocabulary
def test_text_without_spaces_is_exact_and_bounded_in_memory(name: str) -> None:
    chance = random.Random(4)
    characters = [chr(code) for code in range(0x4E00, 0x6200)] + list("的一是不了人我在有他这éаб😀abq1。")
    text = "".join(chance.choices(characters, k=1_500_000))
    tokenizer = Tokenizer(sentencepiece_backend(name))
    assert tokenizer.encode(text[:100_000]) == reference(name).encode(text[:100_000])
    tracemalloc.start()
    ids = tokenizer.encode_array(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * ids.nbytes + 40_000_000
