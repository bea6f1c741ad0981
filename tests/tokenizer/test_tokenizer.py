"""Tokenizer: documents, decoding, digests, and saved folders that transformers loads. Ids: test_encoding.py."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tests.conftest import contents, python_sources
from tests.vocabularies import (
    EDGE_CASES,
    add_tokens,
    every_vocabulary,
    from_json,
    from_model,
    model_bytes,
    reference,
    tokenizers_reference,
    train_sentencepiece,
    write_byte_level,
)

from tinyllama.errors import InputError
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import HuggingFaceBackend, SentencePieceBackend


@every_vocabulary
def test_token_bytes_join_to_the_text(name: str) -> None:
    for tokenizer in (from_model(name), from_json(name)):
        token_bytes = tokenizer.token_bytes()
        assert [token_bytes[number] for number in (0, 1, 2)] == [b""] * 3
        for text in filter(None, EDGE_CASES):
            joined = b"".join(token_bytes[number] for number in tokenizer.encode(text))
            assert joined.decode() == " " + text.replace("▁", " ")


def test_byte_level_tokenizer_is_exact(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path / "gpt2")
    tokenizer = Tokenizer.load(folder)
    theirs = tokenizers_reference(json.loads((folder / "tokenizer.json").read_text()))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (600, 0, 1)
    token_bytes = tokenizer.token_bytes()
    for text in [*EDGE_CASES, "a<|im_end|>b", python_sources(31)[30]]:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert b"".join(token_bytes[number] for number in ids).decode() == text


def test_documents_have_bos_and_eos() -> None:
    tokenizer = from_model("small")
    texts = ["Hello world", "", "x = 1\n"]
    ids = [tokenizer.encode(text) for text in texts]
    assert [array.tolist() for array in tokenizer.encode_documents(texts)] == [[1, *part, 2] for part in ids]
    without = list(tokenizer.encode_documents(iter(texts), bos=False, eos=False))
    assert [array.tolist() for array in without] == ids
    assert {array.dtype for array in without} == {tokenizer.dtype} == {np.dtype(np.uint16)}


def test_vocabulary_above_65536_has_uint32_ids() -> None:
    document = SentencePieceBackend("small", model_bytes("small")).to_tokenizer_json()
    vocabulary = document["model"]["vocab"]
    vocabulary |= {f"unused{number}": len(vocabulary) + number for number in range(65_537 - len(vocabulary))}
    tokenizer = Tokenizer(HuggingFaceBackend("wide", document, {}))
    assert (tokenizer.vocab_size, tokenizer.dtype) == (65_537, np.dtype(np.uint32))
    assert tokenizer.encode("Hello  world") == from_model("small").encode("Hello  world")


@every_vocabulary
def test_both_files_of_a_tokenizer_have_one_digest(name: str, tmp_path: Path) -> None:
    from_model(name).save(tmp_path, 128)
    assert (tmp_path / "tokenizer.model").read_bytes() == model_bytes(name)
    digests = {Tokenizer.load(path).digest for path in (tmp_path, *tmp_path.glob("tokenizer.[jm]*"))}
    assert digests == {from_model(name).digest}
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    for file in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_order_of_merges_changes_digest() -> None:
    document = SentencePieceBackend("small", model_bytes("small")).to_tokenizer_json()
    merges = document["model"]["merges"]
    place = len(merges) // 2
    place += next(i for i, (a, b) in enumerate(pairwise(merges[place:])) if a.replace(" ", "") != b.replace(" ", ""))
    merges[place], merges[place + 1] = merges[place + 1], merges[place]
    assert Tokenizer(HuggingFaceBackend("swapped", document, {})).digest != from_model("small").digest


@every_vocabulary
def test_transformers_loads_saved_folder_with_same_ids(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from_model(name).save(tmp_path, context=128)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))  # as in a release
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), from_model(name)
    plain = [text for text in EDGE_CASES if not any(token in text for token in ("<s>", "</s>", "<unk>"))]
    for text in [*plain, " ".join(plain), python_sources(31)[30]]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [1, *ids]
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.model_max_length == 128
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)


def test_transformers_loads_saved_byte_level_tokenizer_with_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.load(write_byte_level(tmp_path / "gpt2"))
    ours.save(tmp_path / "saved", context=64)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in EDGE_CASES:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (theirs.eos_token_id, theirs.model_max_length) == (1, 64)
    assert Tokenizer.load(tmp_path / "saved").digest == ours.digest


def test_converted_tokenizer_has_sentencepiece_ids(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(model_bytes("small"))
    Tokenizer.load(tmp_path / "a.model").save(tmp_path / "imported")
    converted = Tokenizer.load(tmp_path / "imported/tokenizer.json")
    assert converted.encode("  a  b   c\n") == reference("small").encode("  a  b   c\n")


def test_model_without_equivalent_is_not_converted(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(train_sentencepiece(normalization_rule_name="nmt_nfkc"))
    with pytest.raises(InputError, match=r"a\.model: .*normalization_rule_name"):
        Tokenizer.load(tmp_path / "a.model").save(tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_tokenizer_is_read_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--someone--small"
    from_model("small").save(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert Tokenizer.load("someone/small").digest == from_model("small").digest


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"
"""The beginning of Llama 3's tokenizer.model, which SentencePiece does not read."""


@pytest.mark.parametrize("model", [LFS_POINTER, TIKTOKEN, model_bytes("small")[:-100]])
def test_unreadable_tokenizer_model_next_to_tokenizer_json_is_ignored(tmp_path: Path, model: bytes) -> None:
    folder = write_byte_level(tmp_path / "both")
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "saved")
    assert not (tmp_path / "saved/tokenizer.model").exists()
    assert Tokenizer.load(tmp_path / "saved").digest == tokenizer.digest


@pytest.mark.parametrize(
    ("name", "content", "keywords"),
    [
        ("missing.json", None, "no such file or folder"),
        ("", None, "no tokenizer.json and no tokenizer.model"),
        ("half.json", b'{"model": ', "not valid JSON"),
        ("latin.json", b'{"model": "\xe9"}', "not valid JSON"),
        ("list.json", b"[1]", "JSON list"),
        ("other.json", b'{"model": {"type": "BPE"}}', "not a valid tokenizer.json"),
        ("half.model", model_bytes("small")[:-100], "not a complete SentencePiece model"),
        ("empty.model", b"", "not a complete SentencePiece model"),
        ("pointer.model", LFS_POINTER, "git lfs pull"),
        ("pointer.json", LFS_POINTER, "git lfs pull"),
        ("tiktoken.model", TIKTOKEN, "tiktoken"),
        ("spiece.bin", model_bytes("small"), ".model"),
        ("unigram.model", train_sentencepiece(model_type="unigram"), "type unigram"),
    ],
)
def test_file_that_is_no_tokenizer_is_refused_in_one_line(
    name: str, content: bytes | None, keywords: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        Tokenizer.load(tmp_path / name)
    assert keywords in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_hub_name_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^someone/unheard-of: .*hub") as error:
        Tokenizer.load("someone/unheard-of")
    assert "\n" not in str(error.value)


def test_unknown_id_and_missing_bos_are_refused() -> None:
    with pytest.raises(InputError, match="token id 800"):
        from_model("small").decode([5, 800])
    without = Tokenizer(SentencePieceBackend("bare", train_sentencepiece(bos_id=-1)))
    assert without.bos_id is None
    with pytest.raises(InputError, match=r"bare: no bos_token"):
        next(without.encode_documents(["x"]))


@pytest.mark.parametrize("kind", ["tokenizer.json", "byte-level", "tokenizer.model"])
def test_special_tokens_beyond_the_embedding_are_dropped(kind: str, tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path / "tokens") if kind == "byte-level" else tmp_path / "tokens"
    if kind != "byte-level":
        from_model("small").save(folder)
    original = Tokenizer.load(folder)
    if kind == "tokenizer.model":
        model = ModelProto.FromString((folder / kind).read_bytes())
        for text in ("<pad>", "<cls>"):
            model.pieces.add(piece=text, type=ModelProto.SentencePiece.CONTROL)
        (folder / kind).write_bytes(model.SerializeToString())
        (folder / "tokenizer.json").unlink()
    else:
        add_tokens(folder, "[PAD]", "[CLS]")
    larger = Tokenizer.load(folder)
    fitted = larger.fitted(original.vocab_size)
    assert larger.vocab_size == original.vocab_size + 2
    assert (fitted.vocab_size, fitted.digest) == (original.vocab_size, original.digest)
    assert larger.fitted(larger.vocab_size) is larger
    for text in EDGE_CASES:
        assert fitted.encode(text) == larger.encode(text) == original.encode(text)
    fitted.save(tmp_path / "saved", 64)
    original.save(tmp_path / "expected", 64)
    assert contents(tmp_path / "saved") == contents(tmp_path / "expected")
