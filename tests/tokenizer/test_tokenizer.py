"""The tokenizer's files: loading, saving, converting, training, against SentencePiece, tokenizers and transformers.

That its ids are SentencePiece's is in test_tokenizer_ids.py.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tests.conftest import contents, python_sources
from tests.vocabularies import (
    NASTY,
    add_tokens,
    every_vocabulary,
    from_json,
    from_model,
    model_bytes,
    processor,
    tokenizers_reference,
    train_sentencepiece,
)

from tinyllama.errors import InputError
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import HuggingFaceBackend, SentencePieceBackend
from tinyllama.tokenizer.training import convert_tokenizer, sample_texts, train_tokenizer


@every_vocabulary
def test_pieces_in_bytes_join_to_the_text(name: str) -> None:
    for tokenizer in (from_model(name), from_json(name)):
        pieces = tokenizer.token_bytes()
        assert [pieces[number] for number in (0, 1, 2)] == [b""] * 3
        for text in filter(None, NASTY):
            joined = b"".join(pieces[number] for number in tokenizer.encode(text))
            assert joined.decode() == " " + text.replace("▁", " ")


def write_byte_level(folder: Path) -> Path:
    """A GPT-2-like tokenizer folder as others publish it."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(python_sources(20), vocab_size=600, special_tokens=["<|end|>"], show_progress=False)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": {"content": "<|end|>"}, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_byte_level_tokenizer_json_is_exact(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path / "gpt2")
    tokenizer = Tokenizer.load(folder)
    reference = tokenizers_reference(json.loads((folder / "tokenizer.json").read_text()))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (600, 0, 0)
    pieces = tokenizer.token_bytes()
    for text in [*NASTY, "a<|end|>b", python_sources(31)[30]]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert b"".join(pieces[number] for number in ids).decode() == text


def test_documents_stand_between_their_markers() -> None:
    tokenizer = from_model("small")
    texts = ["Hello world", "", "x = 1\n"]
    ids = [tokenizer.encode(text) for text in texts]
    assert [array.tolist() for array in tokenizer.encode_documents(texts)] == [[1, *part, 2] for part in ids]
    bare = list(tokenizer.encode_documents(iter(texts), start=False, end=False))
    assert [array.tolist() for array in bare] == ids
    assert {array.dtype for array in bare} == {tokenizer.dtype} == {np.dtype(np.uint16)}


def test_a_vocabulary_beyond_65536_pieces_has_wider_ids() -> None:
    document = SentencePieceBackend("small", model_bytes("small")).document()
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


def test_another_order_of_joins_has_another_digest() -> None:
    document = SentencePieceBackend("small", model_bytes("small")).document()
    merges = document["model"]["merges"]
    place = len(merges) // 2
    place += next(i for i, (a, b) in enumerate(pairwise(merges[place:])) if a.replace(" ", "") != b.replace(" ", ""))
    merges[place], merges[place + 1] = merges[place + 1], merges[place]
    assert Tokenizer(HuggingFaceBackend("swapped", document, {})).digest != from_model("small").digest


@every_vocabulary
def test_transformers_loads_a_saved_folder_with_the_same_ids(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from_model(name).save(tmp_path, context=128)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))  # as in a release
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), from_model(name)
    plain = [text for text in NASTY if not any(mark in text for mark in ("<s>", "</s>", "<unk>"))]
    for text in [*plain, " ".join(plain), python_sources(31)[30]]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [1, *ids]
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.model_max_length == 128
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)


def test_transformers_loads_a_saved_byte_level_tokenizer_with_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.load(write_byte_level(tmp_path / "gpt2"))
    ours.save(tmp_path / "saved", context=64)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in NASTY:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (theirs.eos_token_id, theirs.model_max_length) == (0, 64)
    assert Tokenizer.load(tmp_path / "saved").digest == ours.digest


def test_an_import_gives_sentencepieces_ids(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(model_bytes("small"))
    convert_tokenizer(tmp_path / "a.model", tmp_path / "imported")
    imported = Tokenizer.load(tmp_path / "imported/tokenizer.json")
    assert imported.encode("  a  b   c\n") == processor("small").encode("  a  b   c\n")


def test_a_model_without_an_equivalent_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(train_sentencepiece(normalization_rule_name="nmt_nfkc"))
    with pytest.raises(InputError, match=r"a\.model: no tokenizer\.json gives SentencePiece's ids"):
        convert_tokenizer(tmp_path / "a.model", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


TRAIN = """
import hashlib, sys
from tests.conftest import contents, python_sources
from tinyllama.tokenizer.training import train_tokenizer
texts = python_sources(25)
train_tokenizer(reversed(texts) if "reversed" in sys.argv else texts, 700).save(sys.argv[1])
"""


def test_the_same_texts_train_the_same_bytes_in_another_process_and_order(tmp_path: Path) -> None:
    for hash_seed, arguments in (("1", ["one"]), ("2", ["two", "reversed"])):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        folder = str(tmp_path / arguments[0])
        subprocess.run([sys.executable, "-c", TRAIN, folder, *arguments[1:]], env=environment, check=True, cwd=tmp_path)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer(python_sources(60), 2000).save(folder)
    return folder


def test_a_trained_vocabulary_is_of_llama_2s_kind(trained: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))
    tokenizer = Tokenizer.load(trained)
    assert tokenizer.vocab_size == 2000
    assert tokenizer._memo is not None
    assert [reference.id_to_piece(number) for number in (0, 1, 2, 3, 258)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x00>",
        "<0xFF>",
    ]
    for text in [*NASTY, python_sources(70)[69]]:
        assert tokenizer.encode(text) == reference.encode(text)
    split = reference.encode("x\n        return 1234", out_type=str)
    assert split == ["▁x", "<0x0A>", "▁▁▁▁▁▁▁", "▁return", "▁", "1", "2", "3", "4"]


def test_a_sample_is_the_same_in_any_order_and_no_longer_than_asked() -> None:
    texts = python_sources(30)
    sample = sample_texts(texts, 200_000)
    assert sample == sample_texts(reversed(texts), 200_000)
    assert 200_000 <= sum(map(len, sample)) < 300_000
    assert sorted(sample_texts(texts, 10**9)) != sorted(sample)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 500, "the texts are empty"),
        (["", "\n\t"], 500, "the texts are empty"),
        (["abc"], 500, "500 pieces from 3 characters.* <= 26"),
        (["abc " * 50], 100, "100 pieces from 200 characters: .* alone take 263; raise the vocabulary size$"),
        (["abc \ud800"], 500, r"U\+D800 at character 4"),
    ],
)
def test_training_that_cannot_be_says_why(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train_tokenizer(texts, vocab_size)
    assert "\n" not in str(caught.value)


def test_a_hub_name_is_read_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--someone--small"
    snapshot = repository / "snapshots" / ("0" * 40)
    from_model("small").save(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert Tokenizer.load("someone/small").digest == from_model("small").digest


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"
"""How the tokenizer.model of Llama 3 begins, which SentencePiece does not read."""


@pytest.mark.parametrize("model", [LFS_POINTER, TIKTOKEN, model_bytes("small")[:-100]])
def test_a_tokenizer_model_that_cannot_be_read_is_not_needed_beside_a_tokenizer_json(
    tmp_path: Path, model: bytes
) -> None:
    folder = write_byte_level(tmp_path / "both")
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "saved")
    assert not (tmp_path / "saved/tokenizer.model").exists()
    assert Tokenizer.load(tmp_path / "saved").digest == tokenizer.digest


def damage(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def test_a_source_that_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    document = json.dumps(SentencePieceBackend("small", model_bytes("small")).document()).encode()
    sources: dict[str | Path, str] = {
        str(tmp_path / "missing.json"): "no such file or folder",
        str(tmp_path): "no tokenizer.json and no tokenizer.model in this folder",
        "someone/unheard-of": "hub cannot be reached",
        damage(tmp_path, "half.json", document[:-100]): "not valid JSON",
        damage(tmp_path, "latin.json", b'{"model": "\xe9"}'): "not valid JSON",
        damage(tmp_path, "list.json", b"[1]"): "a JSON list where an object belongs",
        damage(tmp_path, "other.json", b'{"model": {"type": "BPE"}}'): "not a valid tokenizer.json",
        damage(tmp_path, "half.model", model_bytes("small")[:-100]): "not a whole SentencePiece model",
        damage(tmp_path, "empty.model", b""): "not a whole SentencePiece model; copy or download",
        damage(tmp_path, "pointer.model", LFS_POINTER): "not a whole SentencePiece model; .*git lfs pull",
        damage(tmp_path, "pointer.json", LFS_POINTER): "not valid JSON .*git lfs pull",
        damage(tmp_path, "tiktoken.model", TIKTOKEN): "tiktoken vocabulary.* name the tokenizer.json",
        damage(tmp_path, "spiece.bin", model_bytes("small")): "not valid JSON .*or end the name .* in .model",
        damage(
            tmp_path, "unigram.model", train_sentencepiece(model_type="unigram")
        ): "of type unigram; .*model_type=bpe",
    }
    for source, message in sources.items():
        with pytest.raises(InputError, match=message) as caught:
            Tokenizer.load(source)
        assert str(source) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_ids_and_markers_that_a_vocabulary_lacks_are_refused() -> None:
    with pytest.raises(InputError, match="token id 800"):
        from_model("small").decode([5, 800])
    without = Tokenizer(SentencePieceBackend("bare", train_sentencepiece(bos_id=-1)))
    assert without.bos_id is None
    with pytest.raises(InputError, match=r"bare: no bos_token; set data\.document\.bos to false$"):
        next(without.encode_documents(["x"]))


@pytest.mark.parametrize("kind", ["tokenizer.json", "byte-level", "tokenizer.model"])
def test_special_tokens_beyond_a_models_rows_are_dropped_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path / "pieces") if kind == "byte-level" else tmp_path / "pieces"
    if kind != "byte-level":
        from_model("small").save(folder)
    whole = Tokenizer.load(folder)
    if kind == "tokenizer.model":
        path = folder / kind
        control = b"\n\t\n\x05<pad>\x18\x03\n\t\n\x05<cls>\x18\x03"  # two pieces of type CONTROL
        path.write_bytes(path.read_bytes() + control)
        (folder / "tokenizer.json").unlink()
    else:
        add_tokens(folder, "[PAD]", "[CLS]")
    larger = Tokenizer.load(folder)
    fitted = larger.fitted(whole.vocab_size)
    assert larger.vocab_size == whole.vocab_size + 2
    assert (fitted.vocab_size, fitted.digest) == (whole.vocab_size, whole.digest)
    assert larger.fitted(larger.vocab_size) is larger
    for text in NASTY:
        assert fitted.encode(text) == larger.encode(text) == whole.encode(text)
    fitted.save(tmp_path / "saved", 64)
    whole.save(tmp_path / "expected", 64)
    assert contents(tmp_path / "saved") == contents(tmp_path / "expected")
