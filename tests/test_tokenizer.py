"""The tokenizer against SentencePiece, tokenizers and transformers.

The vocabulary is a small one trained here, and Llama 2's too where it lies beside the checkout (shared/data/llama2)
or where TINYLLAMA_LLAMA2_TOKENIZER names it.
"""

import io
import json
import os
import subprocess
import sys
import tracemalloc
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import python_sources

from tinyllama.errors import InputError
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer_files import SentencePieceFile, TokenizersFile
from tinyllama.tokenizer_memo import Limits
from tinyllama.tokenizer_training import import_tokenizer, sample_texts, train_tokenizer

LLAMA2 = Path(
    os.environ.get("TINYLLAMA_LLAMA2_TOKENIZER")
    or Path(__file__).resolve().parents[2] / "shared/data/llama2/tokenizer.model"
)
every_vocabulary = pytest.mark.parametrize("name", ["small", *(["llama2"] if LLAMA2.is_file() else [])])
LLAMA_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 800,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
}
# fmt: off
NASTY = [
    "", " ", "▁", "▁▁", "a▁b", "\0", "a\0", "a\0\0b", "\0" * 15, "\t\tif x:\r\n", "  \n \n\n  ", "<s>", "</s>", "<unk>",
    "<0x0A>", " <s>x</s> ", "Hello world  foo", "x = 1234567890.5e-3", "def f(self):\n        return {'a': [1, 2]}\n",
    "é", "日本語テキスト", "\ufeff\ufffd\u200b", "\U0001f468\u200d\U0001f469", "\U0010ffff\uffff\x7f\x80", "İıßﬁ",
    "e\u0301", " " * 255 + "x", " " * 300, "a" * 40, "-" * 90 + " " + "=" * 15, "naïve.foo(é)ñ_1", "\n" * 50 + "x",
    "x" + " \n" * 40,
]
# fmt: on
nasty_texts = st.lists(st.sampled_from(NASTY) | st.text(max_size=8), max_size=8).map("".join)


def train_sentencepiece(**options: Any) -> bytes:
    """A SentencePiece model by its own trainer, scores as it gives them."""
    lines = [line for text in python_sources(30) for line in text.splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **(LLAMA_OPTIONS | options)
    )
    return model.getvalue()


@cache
def model_bytes(name: str) -> bytes:
    return LLAMA2.read_bytes() if name == "llama2" else train_sentencepiece()


@cache
def processor(name: str) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model_bytes(name))


@cache
def from_model(name: str) -> Tokenizer:
    return Tokenizer(SentencePieceFile(name, model_bytes(name)))


@cache
def from_json(name: str) -> Tokenizer:
    return Tokenizer(TokenizersFile(name, SentencePieceFile(name, model_bytes(name)).document(), {}))


@cache
def forgetful(name: str) -> Tokenizer:
    """A tokenizer that starts its memo anew all the time, in two slots, and takes texts in crumbs."""
    return Tokenizer(SentencePieceFile(name, model_bytes(name)), Limits(3000, 1, 5))


@every_vocabulary
@pytest.mark.parametrize("build", [from_model, from_json, forgetful])
def test_ids_and_text_are_sentencepieces(name: str, build: Any) -> None:
    tokenizer, reference = build(name), processor(name)
    for text in [*NASTY, " ".join(NASTY), "".join(NASTY), *python_sources(40)[30:]]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(ids) == text.replace("▁", " ")


@every_vocabulary
@settings(deadline=None, max_examples=150)
@given(text=nasty_texts)
def test_no_text_is_encoded_otherwise_than_by_sentencepiece(name: str, text: str) -> None:
    expected = processor(name).encode(text)
    for build in (from_model, from_json, forgetful):
        assert build(name).encode(text) == expected


@every_vocabulary
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_pieces_in_any_order_are_encoded_as_by_sentencepiece(name: str, data: st.DataObject) -> None:
    pieces = st.integers(0, processor(name).vocab_size() - 1).map(processor(name).id_to_piece)
    text = "".join(data.draw(st.lists(pieces | st.sampled_from([" ", "  ", "\n", "1"]), max_size=30)))
    assert forgetful(name).encode(text) == from_json(name).encode(text) == processor(name).encode(text)


@every_vocabulary
def test_a_full_memo_starts_anew_and_changes_no_id(name: str) -> None:
    texts = python_sources(45)[25:]
    tokenizer = Tokenizer(
        SentencePieceFile(name, model_bytes(name)), Limits(100_000, slot_bits=8, block_bytes=1000)
    )
    first = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == first == [processor(name).encode(text) for text in texts]
    assert tokenizer._memo is not None
    known = tokenizer._memo._known
    assert sys.getsizeof(known) + sum(map(sys.getsizeof, known)) < 200_000
    assert len({run for text in texts for run in text.split()}) > 5000


@every_vocabulary
def test_pieces_in_bytes_join_to_the_text(name: str) -> None:
    for tokenizer in (from_model(name), from_json(name)):
        pieces = tokenizer.piece_bytes()
        assert [pieces[number] for number in (0, 1, 2)] == [b""] * 3
        for text in filter(None, NASTY):
            joined = b"".join(pieces[number] for number in tokenizer.encode(text))
            assert joined.decode() == " " + text.replace("▁", " ")


if LLAMA2.is_file():

    def test_llama_2_gives_its_published_ids() -> None:
        assert from_model("llama2").encode("Hello world  foo") == [15043, 3186, 29871, 7953]
        assert (from_model("llama2").bos_id, from_model("llama2").eos_id, from_model("llama2").unk_id) == (1, 2, 0)


def test_a_long_text_takes_little_more_memory_than_its_ids() -> None:
    text = "".join(python_sources(20)) * 40
    tokenizer = from_model("small")
    tokenizer.encode(text[:1_000_000])
    tracemalloc.start()
    num_bytes = tokenizer.encode_array(text).nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) > 15_000_000
    assert peak < 2 * num_bytes + 12_000_000


@pytest.mark.parametrize("build", [from_model, from_json])
def test_a_lone_surrogate_is_refused_with_its_position(build: Any) -> None:
    plain = Tokenizer(SentencePieceFile("plain", train_sentencepiece(split_by_whitespace=False)))
    for tokenizer in (build("small"), plain):
        with pytest.raises(InputError, match=r"U\+D83D at character 100002"):
            tokenizer.encode("ab " * 33334 + "\ud83d end")


@pytest.mark.parametrize(
    ("options", "has_memo"),
    [
        ({"split_by_whitespace": False}, False),  # pieces such as `in▁the`
        ({"byte_fallback": False}, False),  # neighbouring unknown characters share one <unk>
        ({"normalization_rule_name": "nmt_nfkc"}, False),
        ({"remove_extra_whitespaces": True}, False),
        ({"add_dummy_prefix": False}, False),
        ({"treat_whitespace_as_suffix": True}, False),
        ({"split_digits": False, "split_by_number": False, "split_by_unicode_script": False}, True),  # longer runs
        ({"user_defined_symbols": ["<|fim|>", "->"]}, True),
    ],
)
def test_other_vocabularies_are_exact_with_or_without_the_memo(options: dict[str, Any], has_memo: bool) -> None:
    model = train_sentencepiece(**options)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer(SentencePieceFile("other", model), Limits(block_bytes=50))
    assert (tokenizer._memo is not None) == has_memo
    for text in [*NASTY, " ".join(NASTY), "x <|fim|> y->z <|fim|>", python_sources(31)[30]]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_a_tokenizer_json_whose_pieces_cross_words_is_exact_without_the_memo() -> None:
    document = SentencePieceFile("crossing", train_sentencepiece(split_by_whitespace=False)).document()
    tokenizer, reference = Tokenizer(TokenizersFile("crossing", document, {})), tokenizers_reference(document)
    assert tokenizer._memo is None
    for text in [*NASTY, python_sources(31)[30]]:
        assert tokenizer.encode(text) == reference.encode(text).ids


def tokenizers_reference(document: dict[str, Any]) -> Any:
    """`tokenizers` itself, no markers, special tokens read as text."""
    reference = tokenizers.Tokenizer.from_str(json.dumps(document | {"post_processor": None}))
    reference.encode_special_tokens = True
    return reference


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
    pieces = tokenizer.piece_bytes()
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
    document = SentencePieceFile("small", model_bytes("small")).document()
    vocabulary = document["model"]["vocab"]
    vocabulary |= {f"unused{number}": len(vocabulary) + number for number in range(65_537 - len(vocabulary))}
    tokenizer = Tokenizer(TokenizersFile("wide", document, {}))
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
    document = SentencePieceFile("small", model_bytes("small")).document()
    merges = document["model"]["merges"]
    place = len(merges) // 2
    place += next(i for i, (a, b) in enumerate(pairwise(merges[place:])) if a.replace(" ", "") != b.replace(" ", ""))
    merges[place], merges[place + 1] = merges[place + 1], merges[place]
    assert Tokenizer(TokenizersFile("swapped", document, {})).digest != from_model("small").digest


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
    import_tokenizer(tmp_path / "a.model", tmp_path / "imported")
    imported = Tokenizer.load(tmp_path / "imported/tokenizer.json")
    assert imported.encode("  a  b   c\n") == processor("small").encode("  a  b   c\n")


def test_a_model_without_an_equivalent_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(train_sentencepiece(normalization_rule_name="nmt_nfkc"))
    with pytest.raises(InputError, match=r"a\.model: no tokenizer\.json gives SentencePiece's ids"):
        import_tokenizer(tmp_path / "a.model", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


TRAIN = """
import hashlib, sys
from tests.conftest import python_sources
from tinyllama.tokenizer_training import train_tokenizer
texts = python_sources(25)
train_tokenizer(reversed(texts) if "reversed" in sys.argv else texts, 700).save(sys.argv[1])
"""


def test_the_same_texts_train_the_same_bytes_in_another_process_and_order(tmp_path: Path) -> None:
    for hash_seed, arguments in (("1", ["one"]), ("2", ["two", "reversed"])):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[1])}
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
        (["abc " * 50], 100, "100 pieces from 200 characters"),
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


def damage(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def test_a_source_that_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    document = json.dumps(SentencePieceFile("small", model_bytes("small")).document()).encode()
    sources: dict[str | Path, str] = {
        str(tmp_path / "missing.json"): "no such file or folder",
        str(tmp_path): "no tokenizer.json and no tokenizer.model in this folder",
        "someone/unheard-of": "hub cannot be reached",
        damage(tmp_path, "half.json", document[:-100]): "not valid JSON",
        damage(tmp_path, "latin.json", b'{"model": "\xe9"}'): "not valid JSON",
        damage(tmp_path, "list.json", b"[1]"): "a JSON list where an object belongs",
        damage(tmp_path, "other.json", b'{"model": {"type": "BPE"}}'): "not a valid tokenizer.json",
        damage(tmp_path, "half.model", model_bytes("small")[:-100]): "not a whole SentencePiece model",
        damage(tmp_path, "empty.model", b""): "not a BPE model of SentencePiece",
        damage(tmp_path, "unigram.model", train_sentencepiece(model_type="unigram")): "not a BPE model",
    }
    for source, message in sources.items():
        with pytest.raises(InputError, match=message) as caught:
            Tokenizer.load(source)
        assert str(source) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_ids_and_markers_that_a_vocabulary_lacks_are_refused() -> None:
    with pytest.raises(InputError, match="token id 800"):
        from_model("small").decode([5, 800])
    without = Tokenizer(SentencePieceFile("bare", train_sentencepiece(bos_id=-1)))
    assert without.bos_id is None
    with pytest.raises(InputError, match=r"bare: no start marker; set document\.start to false"):
        next(without.encode_documents(["x"]))
