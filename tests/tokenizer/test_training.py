"""Training: reproducible Llama-style vocabularies, text without spaces, and lines that SentencePiece would drop."""

import io
import os
import random
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import python_sources, small_recipe, write_jsonl
from tests.prepare.raw import lines, write
from tests.vocabularies import EDGE_CASES, LLAMA_OPTIONS
from transformers import AutoTokenizer

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.tokenizer import Tokenizer, training
from tinyllama.tokenizer.training import sample_excerpts, train_tokenizer, training_text

TRAIN_PROGRAM = Path(__file__).with_name("train_program.py")


@pytest.mark.parametrize("kind", ["llama2", "bytelevel"])
def test_same_texts_train_same_files_in_any_process_and_order(tmp_path: Path, kind: str) -> None:
    for hash_seed, arguments in (("1", ["one", kind]), ("2", ["two", kind, "reversed"])):
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        command = [sys.executable, str(TRAIN_PROGRAM), *arguments]
        subprocess.run(command, env=environment, check=True, cwd=tmp_path)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    model = ["tokenizer.model"] if kind == "llama2" else []
    assert files == ["special_tokens_map.json", "tokenizer.json", *model, "tokenizer_config.json"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_trained_vocabulary_is_llama_style(tmp_path: Path) -> None:
    train_tokenizer(training_text(python_sources(60)), 2000).save(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 2000
    assert tokenizer._encoder is not None
    first = [reference.id_to_piece(number) for number in (0, 1, 2, 3, 258)]
    assert first == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    for text in [*EDGE_CASES, python_sources(70)[69]]:
        assert tokenizer.encode_array(text).tolist() == reference.encode(text)
    tokens = reference.encode("x\n        return 1234", out_type=str)
    assert tokens == ["▁x", "<0x0A>", "▁▁▁▁▁▁▁", "▁return", "▁", "1", "2", "3", "4"]


def test_trained_byte_level_vocabulary_is_like_llama_3s(tmp_path: Path) -> None:
    train_tokenizer(training_text(python_sources(60), kind="bytelevel"), 2000).save(tmp_path, 64)
    tokenizer, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.vocab_size, len(theirs), tokenizer._encoder is not None) == (2000, 2000, True)
    assert sorted(tokenizer.token_bytes()[:256]) == [bytes([byte]) for byte in range(256)]
    special = [tokenizer._backend.token(number) for number in (tokenizer.bos_id, tokenizer.eos_id)]
    assert special == ["<|begin_of_text|>", "<|end_of_text|>"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.bos_prefix) == (1998, 1999, [1998])
    for text in [*EDGE_CASES, python_sources(70)[69]]:
        ids = tokenizer.encode(text)
        assert tokenizer.encode_array(text).tolist() == ids
        assert theirs(text).input_ids == [1998, *ids]
        assert tokenizer.decode(ids) == theirs.decode(ids) == text
    ids = tokenizer.encode("x\n        return 1234 don't")
    assert [tokenizer.decode([number]) for number in ids][:3] == ["x", "\n", "       "]
    assert max(map(len, re.findall(r"\d+", " ".join(tokenizer.decode([number]) for number in range(2000))))) == 3


def test_sample_does_not_depend_on_order_and_is_bounded() -> None:
    texts = python_sources(30)
    sample = sample_excerpts(texts, 200_000)
    assert sample == sample_excerpts(reversed(texts), 200_000)
    assert 200_000 <= sum(map(len, sample)) < 300_000
    assert sorted(sample_excerpts(texts, 10**9)) != sorted(sample)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 500, "texts are empty"),
        (["", "\n\t"], 500, "texts are empty"),
        (["▅"], 300, "texts are empty"),
        (["▅▅\n▅"], 300, "texts are empty"),
        (["abc"], 500, "500 tokens from 3 characters.* at most 26"),
        (["abc " * 50], 100, "100 tokens from 200 characters: .* alone need 263"),
        (["abc \ud800"], 500, r"U\+D800 at character 4"),
    ],
)
def test_impossible_training_is_refused_in_one_line(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        train_tokenizer(training_text(texts), vocab_size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 500, "texts are empty"),
        ([""], 500, "texts are empty"),
        (["abc"], 500, "500 tokens from 3 characters.* at most 260"),
        (["abc " * 50], 100, "100 tokens from 200 characters: .* alone need 258"),
        (["abc \ud800"], 500, r"U\+D800 at character 4"),
    ],
)
def test_impossible_byte_level_training_is_refused_in_one_line(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        train_tokenizer(training_text(texts, kind="bytelevel"), vocab_size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a\tb\nc\t" * 3000, "a\u00a0b" * 2000, "ab▅cd▅" * 2000])
def test_remedies_for_a_wrong_size_lead_to_a_size_that_trains(text: str) -> None:
    sizes = []
    for vocab_size in (100, 5000):
        with pytest.raises(InputError) as error:
            train_tokenizer(training_text([text]), vocab_size)
        sizes.append(int(re.findall(r"(?:need|at most) (\d+)", str(error.value))[0]))
    assert [train_tokenizer(training_text([text]), size).vocab_size for size in sizes] == sizes


def random_texts(alphabet: str) -> list[str]:
    return ["".join(random.Random(seed).choices(alphabet, k=3000)) for seed in range(20)]


PROTEIN = random_texts("ACDEFGHIKLMNPQRSTVWY")
UNSPACED = {
    "protein": PROTEIN,
    "hexadecimal": random_texts("0123456789abcdef"),
    "hiragana": random_texts("".join(map(chr, range(0x3041, 0x3094)))),
    "one space in 60,000 characters": [*PROTEIN, "MKV LAT"],
}


@pytest.mark.parametrize("name", UNSPACED)
def test_vocabulary_of_text_without_spaces_decodes_spaces(name: str, tmp_path: Path) -> None:
    train_tokenizer(training_text(UNSPACED[name]), 400).save(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ours.vocab_size == 400
    for text in [*(text for text in EDGE_CASES if "▁" not in text), "MKV LAT", "  two", "そら と うみ"]:
        ids = ours.encode(text)
        assert ids == reference.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == reference.decode(ids) == theirs.decode(ids) == text
    assert len(ours.encode("    ")) == 5  # one token per space, and the dummy prefix


@cache
def spaceless() -> Tokenizer:
    return train_tokenizer(training_text(PROTEIN), 350)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=60))
def test_any_text_decodes_to_itself(text: str) -> None:
    assert spaceless().decode(spaceless().encode(text)) == text


def test_vocabulary_of_text_with_spaces_equals_sentencepiece() -> None:
    texts, model = python_sources(30), io.BytesIO()
    options = LLAMA_OPTIONS | {"add_dummy_prefix": False, "max_sentence_length": 400_000, "minloglevel": 2}
    lines = iter(training_text(texts).lines)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = train_tokenizer(training_text(texts), 800)
    assert [ours._backend.token(number) for number in range(800)] == [reference.id_to_piece(n) for n in range(800)]
    # an option that is given, even an empty one, is stored in the file
    trained = sentencepiece.sentencepiece_model_pb2.ModelProto.FromString(ours._backend.sentencepiece_model())
    assert not trained.trainer_spec.HasField("required_chars")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe without a tokenizer, for the text in raw/."""
    monkeypatch.chdir(tmp_path)
    fields = small_recipe(Path())
    fields["data"]["validation_fraction"] = 0
    fields["data"]["sources"] = {"text": {"format": "jsonl", "path": "raw", "weight": 1}}
    Path("recipe.yaml").write_text(yaml.safe_dump(fields))
    return Path("recipe.yaml")


def test_vocabulary_that_does_not_decode_is_not_written(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(Path("raw/a.jsonl"), PROTEIN)
    train = training._train
    monkeypatch.setattr(training, "_train", lambda lines, vocab_size, **_: train(lines, vocab_size))  # as SentencePiece
    assert cli.main(["--quiet", "tokenizer", "train", str(recipe), "--vocab-size", "350"]) == 2
    assert "changes the text" in capsys.readouterr().err
    assert not Path("tokenizer").exists()


def test_vocabulary_size_is_the_flag_or_the_size_in_the_recipe(recipe: Path) -> None:
    write_jsonl(Path("raw/a.jsonl"), python_sources(10))
    recipe.write_text(f"{recipe.read_text()}\nvocab_size: 600\n")
    for folder, flags, size in (("one", [], 600), ("two", ["--vocab-size", "610"], 610)):
        assert cli.main(["--quiet", "tokenizer", "train", str(recipe), "--tokenizer", folder, *flags]) == 0
        assert Tokenizer.load(folder).vocab_size == size


def test_kind_is_the_flag_or_the_kind_in_the_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"{text}\t▅" for text in python_sources(10)]
    write_jsonl(Path("raw/a.jsonl"), texts)
    recipe.write_text(f"{recipe.read_text()}\nvocab_size: 600\ntokenizer_kind: bytelevel\n")
    for folder, flags, bos in (
        ("one", [], 598),
        ("two", ["--kind", "llama2"], 1),
        ("three", ["--kind=bytelevel"], 598),
    ):
        assert cli.main(["--quiet", "tokenizer", "train", str(recipe), "--tokenizer", folder, *flags]) == 0
        tokenizer = Tokenizer.load(folder)
        assert (tokenizer.vocab_size, tokenizer.bos_id) == (600, bos)
        assert ("not used" in capsys.readouterr().out) == (folder == "two")
    assert cli.main(["--quiet", "tokenizer", "train", str(recipe), "--kind", "unigram", "--force"]) == 2
    assert "--kind: 'unigram' is not valid; give one of llama2, bytelevel" in capsys.readouterr().err
    assert cli.main(["--quiet", "tokenizer", "train", str(recipe), "--tokenizer_kind", "unigram"]) == 2
    assert "--tokenizer_kind: 'unigram' should be 'llama2' or 'bytelevel'" in capsys.readouterr().err


def test_lines_with_the_reserved_character_are_used(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"cpu{'▅' * count} throughput\n" for count in range(1, 6)] * 40
    write_jsonl(Path("raw/a.jsonl"), [*lines, "memory \t latency"])
    assert cli.main(["--quiet", "tokenizer", "train", str(recipe), "--vocab-size", "292"]) == 0
    tokenizer = Tokenizer.load("tokenizer")
    assert "▁throughput" in {token.text for token in tokenizer._backend.tokens}
    assert tokenizer.decode(tokenizer.encode("cpu▅ 9 %")) == "cpu▅ 9 %"
    output = capsys.readouterr().out
    used = 200 * len("cpu throughput") + len("memory  latency")
    assert f"trained on {used:,} characters" in output
    assert "201 control characters" in output
    assert "600 of U+2585" in output


def test_no_other_character_drops_its_line() -> None:
    """SentencePiece's trainer drops lines without an error, so each one-character line must come back as a token."""
    lost: list[str] = []
    every = [chr(code) for code in range(0x80, 0x20000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(every), 1500):
        characters = every[start : start + 1500]
        lines = training_text(characters).lines
        found = {piece.piece for piece in training._train(lines, 259 + len(lines)).pieces[259:]}
        lost += [character for character in characters if character not in found]
    assert lost == ["▅"]


def test_text_beyond_the_sample_is_counted() -> None:
    texts = python_sources(30)
    text = training_text(texts, num_characters=50_000)
    assert text.num_characters + sum(text.unused.values()) == sum(map(len, texts))
    assert text.unused["beyond the sample of 50,000"] > sum(map(len, texts)) / 2


def test_sample_is_counted_by_source(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = yaml.safe_load(recipe.read_text())
    fields["data"]["sources"]["notes"] = {"format": "text", "path": "notes/*.md", "weight": 1}
    recipe.write_text(yaml.safe_dump(fields))
    write_jsonl(Path("raw/a.jsonl"), ["abcé " * 30, "bca " * 30])
    write(Path("notes/a.md"), b"cab " * 30)
    assert cli.main(["--quiet", "tokenizer", "train", str(recipe), "--vocab-size", "266"]) == 0
    output = capsys.readouterr().out
    assert "sample of text: 2 documents, 300 bytes" in output
    assert "sample of notes: 1 documents, 120 bytes" in output


@pytest.mark.parametrize(
    ("rows", "weight", "message"),
    [
        ([{"title": "a", "body": "b"}] * 3, 1, "3 rows no text.*fields title, body; set the source's text"),
        ([{"title": "a", "body": "b"}] * 3, 0, "3 rows no text.*fields title, body"),
        ([{"text": ""}], 1, "1 rows empty text.; add text"),
        ([], 1, "no rows at all"),
    ],
)
def test_source_without_usable_row_is_an_error_with_its_fields(
    recipe: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, str]], weight: int, message: str
) -> None:
    fields = yaml.safe_load(recipe.read_text())
    fields["data"]["sources"]["notes"] = {"format": "jsonl", "path": "notes.jsonl", "weight": weight}
    recipe.write_text(yaml.safe_dump(fields))
    write_jsonl(Path("raw/a.jsonl"), ["abc " * 100])
    write(Path("notes.jsonl"), lines(*rows))
    assert cli.main(["--quiet", "tokenizer", "train", str(recipe), "--vocab-size", "265"]) == 2
    assert re.search(f"data.sources.notes: no document left to train on .{message}", capsys.readouterr().err)
    assert not Path("tokenizer").exists()


def test_force_replaces_only_a_tokenizer_that_nothing_uses(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(*flags: str) -> tuple[int, str]:
        status = cli.main(["--quiet", "tokenizer", "train", str(recipe), *flags])
        return status, capsys.readouterr().err

    write_jsonl(Path("raw/a.jsonl"), python_sources(3))
    assert train("--vocab-size", "500") == (0, "")
    status, error = train("--vocab-size", "510")
    assert status == 2
    assert "tokenizer: tokenizer exists; add --force" in error
    assert train("--vocab-size", "510", "--force") == (0, "")
    digest = Tokenizer.load("tokenizer").digest
    assert Tokenizer.load("tokenizer").vocab_size == 510
    for folder, name in (("store", "manifest.json"), ("runs/small", "store.json")):  # as `prepare` and `train` write it
        write(Path(folder, name), lines({"tokenizer": {"digest": "of another"}}))
        assert train("--vocab-size", "510", "--force") == (0, "")
        write(Path(folder, name), lines({"tokenizer": {"digest": digest}}))
        status, error = train("--force")
        assert status == 2
        assert f"{folder}: made with the tokenizer in tokenizer; delete it" in error
        shutil.rmtree(folder)
    write(Path("tokenizer/model.safetensors"), b"weights")
    status, error = train("--force")
    assert status == 2
    assert "tokenizer/model.safetensors: not a tokenizer's file" in error
    assert Tokenizer.load("tokenizer").digest == digest
