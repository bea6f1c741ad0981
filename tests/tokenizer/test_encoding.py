"""Token ids equal those of SentencePiece and `tokenizers`: real text, every character, random text, long text."""

import multiprocessing
import random
import re
import resource
import string
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import python_sources
from tests.vocabularies import (
    EDGE_CASES,
    LLAMA2,
    SENTENCEPIECE,
    backend_of,
    byte_level_document,
    every_byte_level,
    every_encoder,
    every_vocabulary,
    from_json,
    from_model,
    reference,
    reference_of,
    tokenizer_of,
    tokenizers_reference,
    train_sentencepiece,
    trained_byte_level,
    with_small_windows,
)

from tinyllama.errors import InputError
from tinyllama.hardware import resident_memory_bytes
from tinyllama.prepare.corpus import CorpusSizes
from tinyllama.prepare.readers import RejectedRow, SourceRow, read_rows
from tinyllama.prepare.sources import list_files
from tinyllama.recipe import Source
from tinyllama.text import to_str
from tinyllama.tokenizer import Tokenizer, encoder
from tinyllama.tokenizer.backends import HuggingFaceBackend, SentencePieceBackend

pytestmark = pytest.mark.slow

CORPUS = ("slimpajama", "starcoderdata")
SPECIAL = ["<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_end|>", "<tool>", "<too", "\x04", "\x16", "'ll", "e\u0301"]
runs = st.builds(lambda character, count: character * count, st.sampled_from(" \n\t▁\0a1-"), st.integers(1, 300))
edge_case_texts = st.lists(st.sampled_from([*EDGE_CASES, *SPECIAL]) | runs | st.text(max_size=8), max_size=8).map(
    "".join
)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode_array(text).tolist()
    return ids


def rows_in(folder: Path, name: str) -> Iterator[SourceRow | RejectedRow]:
    source = Source(format=name, path=str(folder / name), weight=1)
    for file in list_files(name, source):
        yield from read_rows(file.path, source)


@every_vocabulary
@pytest.mark.parametrize("build", [from_model, from_json, with_small_windows])
def test_ids_and_text_equal_sentencepiece(name: str, build: Any) -> None:
    tokenizer, theirs = build(name), reference(name)
    for text in [*EDGE_CASES, " ".join(EDGE_CASES), "".join(EDGE_CASES), *python_sources(40)[30:]]:
        ids = theirs.encode(text)
        assert ids_of(tokenizer, text) == tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids) == text.replace("▁", " ")


@every_byte_level
@pytest.mark.parametrize("build", [tokenizer_of, with_small_windows])
def test_ids_and_text_equal_tokenizers(name: str, build: Any) -> None:
    tokenizer, theirs = build(name), reference_of(name)
    for text in [*EDGE_CASES, *SPECIAL, " ".join(EDGE_CASES + SPECIAL), "".join(EDGE_CASES), *python_sources(40)[30:]]:
        assert ids_of(tokenizer, text) == tokenizer.encode(text) == theirs(text)


@every_encoder
@settings(deadline=None, max_examples=60)
@given(texts=st.lists(edge_case_texts, max_size=8))
def test_random_texts_have_the_ids_of_the_library(name: str, texts: list[str]) -> None:
    expected = [reference_of(name)(text) for text in texts]
    for tokenizer in (tokenizer_of(name), with_small_windows(name)):
        assert [ids.tolist() for ids in tokenizer.encode_documents(texts, bos=False, eos=False)] == expected


@every_encoder
def test_every_unicode_character_has_the_ids_of_the_library(name: str) -> None:
    step = 1 if name in SENTENCEPIECE else 29  # `tokenizers` is slow
    characters = [chr(code) for code in range(0, 0x110000, step) if not 0xD800 <= code < 0xE000]
    blocks = [characters[start : start + 5000] for start in range(0, len(characters), 5000)]
    texts = ["".join(block) for block in blocks] + [" a".join(block[::3]) for block in blocks]
    for text in texts:
        assert ids_of(tokenizer_of(name), text) == reference_of(name)(text)


def test_characters_of_a_newer_unicode_have_the_ids_of_the_library() -> None:
    """Found 2026-11-30: CJK Extension J (Unicode 17) consists of letters for gigatoken, but not for `tokenizers`."""
    tokenizer = trained_byte_level()
    tokens = [token.decode() for token in tokenizer.token_bytes() if re.fullmatch(rb"[!-/][a-z]+", token)]
    assert tokenizer._encoder is not None
    for token in tokens:
        assert ids_of(tokenizer, f"\U000323b0{token}") == tokenizer.encode(f"\U000323b0{token}")
    assert tokens


def test_gigatoken_is_not_used_if_its_unicode_differs_for_known_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_is_assigned", lambda _: True)  # as in a Python with Unicode 17
    assert Tokenizer(trained_byte_level()._backend)._encoder is None


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


@every_encoder
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_tokens_in_any_order_have_the_ids_of_the_library(name: str, data: st.DataObject) -> None:
    tokens = [token.text.replace("Ġ", " ").replace("Ċ", "\n") for token in backend_of(name).tokens]
    text = "".join(data.draw(st.lists(st.sampled_from([*tokens, " ", "  ", "\n", "1"]), max_size=60)))
    assert ids_of(with_small_windows(name), text) == ids_of(tokenizer_of(name), text) == reference_of(name)(text)


@every_encoder
@settings(deadline=None, max_examples=20)
@given(text=edge_case_texts)
def test_bytes_have_the_ids_of_the_string(name: str, text: str) -> None:
    tokenizer = with_small_windows(name)
    for kind in (text.encode(), bytearray(text.encode())):
        assert tokenizer.encode_array(kind).tolist() == ids_of(tokenizer, text)


if LLAMA2.is_file():

    def test_llama_2_has_its_published_ids() -> None:
        assert ids_of(from_model("llama2"), "Hello world  foo") == [15043, 3186, 29871, 7953]
        assert (from_model("llama2").bos_id, from_model("llama2").eos_id, from_model("llama2").unk_id) == (1, 2, 0)


ALPHABETS = {
    "one letter": "a",
    "DNA": "ACGT",
    "Chinese": "".join(map(chr, range(0x4E00, 0x6200))),
    "base64": string.ascii_letters + string.digits + "+/",
    "binary": "".join(map(chr, range(256))),
    "Hangul": "가각힣\u1100\u1161",
    "mixed": "aA1 \n'.é的😀\u0301",
    "spaces": " \n",
    "digits": string.digits,
    "dashes": "-",
    "one space": " ",
    "one newline": "\n",
    "words": ["a1", "= ", "b ", ".\n", "- ", "\n  ", "42", "it's"],
    "decomposed": ["a\u0316\u0301", "1\u0301", "=\u0338", " "],
}


def long_text(kind: str, count: int) -> str:
    """Return a text of `count` random members of an alphabet."""
    return "".join(random.Random(4).choices(ALPHABETS[kind], k=count))


@every_encoder
@pytest.mark.parametrize("kind", ALPHABETS)
def test_long_texts_have_the_ids_of_the_library(name: str, kind: str) -> None:
    text = long_text(kind, 6000)
    assert ids_of(with_small_windows(name), text) == reference_of(name)(text)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *product([SENTENCEPIECE[-1], "qwen2"], ["one letter", "DNA", "Chinese", "base64", "binary"]),
        *product(["llama3"], ["digits", "dashes", "spaces", "one space"]),
        *product(["smollm", "gpt2"], ["digits"]),
    ],
)
def test_long_text_is_encoded_in_windows(name: str, kind: str) -> None:
    encoder, text = tokenizer_of(name)._encoder, long_text(kind, 2_200_000)
    assert encoder is not None
    parts = list(encoder.encode(text))
    assert len(parts) >= 3
    assert np.array_equal(np.concatenate(parts), encoder._encode_window(encoder._prefix + text))


def test_long_text_needs_little_more_memory_than_its_ids() -> None:
    text = "".join(python_sources(20)) * 40
    tokenizer = from_model("small")
    tokenizer.encode_array(text[:1_000_000])
    tracemalloc.start()
    num_bytes = tokenizer.encode_array(text).nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) > 15_000_000
    assert peak < 2 * num_bytes + 12_000_000


def test_parts_of_a_document_are_small() -> None:
    text = "".join(python_sources(20)) * 4
    parts = list(from_model("small").encode_parts(text))
    assert max(map(len, parts)) < 0.6 * sum(map(len, parts))
    assert np.concatenate(parts).tolist() == [1, *reference("small").encode(text), 2]


@pytest.mark.long
def test_endless_vocabulary_needs_bounded_memory() -> None:
    tokenizer = from_model("small")
    generator, before = np.random.default_rng(0), resident_memory_bytes()
    for _ in range(100):
        letters = generator.integers(97, 123, (200_000, 7), dtype=np.uint8)
        letters[:, 0] = 32
        tokenizer.encode_array(letters.tobytes())
        assert resident_memory_bytes() < before + 600_000_000


@pytest.mark.long
@every_encoder
@pytest.mark.parametrize("kind", ["one letter", "digits", "dashes", "one newline", "one space", "words"])
def test_long_document_needs_bounded_memory(name: str, kind: str) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(growth_of_memory, (name, long_text(kind, 500_000) * 40)) < 300_000_000


def growth_of_memory(name: str, text: str) -> int:
    """Return by how many bytes the peak memory of this process grows while it encodes a text."""
    encoder = tokenizer_of(name)._encoder
    assert encoder is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in encoder.encode(text):
        pass
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_texts_are_read_one_at_a_time() -> None:
    texts = iter(["first", "second"])
    assert len(next(from_model("small").encode_documents(texts))) > 2
    assert list(texts) == ["second"]


def test_forked_process_encodes_without_threads() -> None:
    tokenizer = tokenizer_of("gpt2")
    tokenizer.start_encoder()
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        ids, num_threads = pool.apply(encode_and_count_threads, (python_sources(31)[30] * 20,))
    assert ids == ids_of(tokenizer, python_sources(31)[30] * 20)
    assert num_threads == 1


def encode_and_count_threads(text: str) -> tuple[list[int], int]:
    ids = ids_of(tokenizer_of("gpt2"), text)
    found = re.search(r"Threads:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return ids, int(found[1])


@pytest.mark.parametrize("build", [from_model, from_json])
def test_lone_surrogate_is_refused_with_its_position(build: Any) -> None:
    plain = Tokenizer(SentencePieceBackend("plain", train_sentencepiece(byte_fallback=False)))
    text = "ab " * 33334 + "\ud83d end"
    for tokenizer in (build("small"), plain):
        for encode in (tokenizer.encode, tokenizer.encode_array):
            with pytest.raises(InputError, match=r"U\+D83D at character 100002"):
                encode(text)


@pytest.mark.parametrize(
    ("options", "uses_gigatoken"),
    [
        ({"split_by_whitespace": False}, True),  # tokens such as `in▁the`
        ({"byte_fallback": False}, False),  # adjacent unknown characters share one <unk>
        ({"normalization_rule_name": "nmt_nfkc"}, False),
        ({"remove_extra_whitespaces": True}, False),
        ({"add_dummy_prefix": False}, False),
        ({"treat_whitespace_as_suffix": True}, False),
        ({"split_digits": False, "split_by_number": False, "split_by_unicode_script": False}, True),  # longer pretokens
        ({"user_defined_symbols": ["<|fim|>", "->"]}, False),
        ({"user_defined_symbols": [":\n", "\nx", "\n\n"]}, False),
    ],
)
def test_other_vocabularies_are_exact_with_or_without_gigatoken(
    options: dict[str, Any], uses_gigatoken: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    model = train_sentencepiece(**options)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer(SentencePieceBackend(str(options), model))
    texts = [*EDGE_CASES, " ".join(EDGE_CASES), "x <|fim|> y->z <|fim|>", "if x:\n\nx\n:\n", python_sources(31)[30]]
    for text in texts:
        ids = theirs.encode(text)
        assert ids_of(tokenizer, text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids)
    assert (tokenizer._encoder is not None) == uses_gigatoken
    assert capfd.readouterr().err.count("sentencepiece encodes the documents") == (not uses_gigatoken)


def test_tokens_across_words_are_exact() -> None:
    document = SentencePieceBackend("crossing", train_sentencepiece(split_by_whitespace=False)).to_tokenizer_json()
    tokenizer, theirs = Tokenizer(HuggingFaceBackend("crossing", document, {})), tokenizers_reference(document)
    for text in [*EDGE_CASES, python_sources(31)[30]]:
        assert ids_of(tokenizer, text) == theirs.encode(text).ids


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"normalizer": {"type": "NFKC"}},
        {"model": byte_level_document("gpt2")["model"] | {"end_of_word_suffix": "</w>"}},
    ],
    ids=["no pre-tokenizer", "prefix space", "NFKC", "suffix"],
)
def test_tokenizer_json_that_gigatoken_would_encode_differently_is_encoded_by_tokenizers(
    changes: dict[str, Any],
) -> None:
    document = byte_level_document("gpt2") | changes
    tokenizer, theirs = Tokenizer(HuggingFaceBackend("other", document, {})), tokenizers_reference(document)
    assert tokenizer._encoder is None
    for text in [*EDGE_CASES, python_sources(31)[30]]:
        assert ids_of(tokenizer, text) == theirs.encode(text).ids


def test_added_token_with_a_digit_is_encoded_by_tokenizers() -> None:
    document = byte_level_document("smollm")
    renamed = [token | {"content": token["content"].replace("<tool>", "<t1>")} for token in document["added_tokens"]]
    tokenizer = Tokenizer(HuggingFaceBackend("digit", document | {"added_tokens": renamed}, {}))
    assert ids_of(tokenizer, "a<t1>b")[1] == tokenizer.vocab_size - 1
    assert tokenizer._encoder is None


def test_library_encodes_where_gigatoken_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    tokenizer = Tokenizer(HuggingFaceBackend("without", byte_level_document("gpt2"), {}))
    assert ids_of(tokenizer, "a b") == reference_of("gpt2")("a b")
    assert re.fullmatch(r"without: tokenizers encodes .*gigatoken.* is not installed.*\n", capfd.readouterr().err)
