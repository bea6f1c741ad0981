"""Training a vocabulary: text without spaces, and text that SentencePiece's trainer drops without an error."""

import io
import random
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import python_sources, small_recipe, write_jsonl
from tests.vocabularies import LLAMA_OPTIONS, NASTY

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.tokenizer import Tokenizer, training
from tinyllama.tokenizer.conversion import parse_model
from tinyllama.tokenizer.training import train_tokenizer, training_text

REQUIRED_CHARS = 36  # the number of the field in sentencepiece_model.proto


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
def test_a_vocabulary_of_text_without_spaces_decodes_spaces(name: str, tmp_path: Path) -> None:
    train_tokenizer(UNSPACED[name], 400).save(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ours.vocab_size == 400
    for text in [*(text for text in NASTY if "▁" not in text), "MKV LAT", "  two", "そら と うみ"]:
        ids = ours.encode(text)
        assert ids == reference.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == reference.decode(ids) == theirs.decode(ids) == text
    assert len(ours.encode("    ")) == 5  # one token per space, that in front of a document included


@cache
def spaceless() -> Tokenizer:
    return train_tokenizer(PROTEIN, 350)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=60))
def test_any_text_without_the_space_symbol_decodes_to_itself(text: str) -> None:
    assert spaceless().decode(spaceless().encode(text)) == text


def test_text_with_spaces_has_the_vocabulary_that_sentencepiece_trains() -> None:
    texts, model = python_sources(30), io.BytesIO()
    options = LLAMA_OPTIONS | {"add_dummy_prefix": False, "max_sentence_length": 400_000, "minloglevel": 2}
    lines = iter(training_text(texts).lines)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = train_tokenizer(texts, 800)
    assert [ours._file.token(number) for number in range(800)] == [reference.id_to_piece(n) for n in range(800)]
    _, trainer, _ = parse_model(ours._file.sentencepiece_model() or b"")
    assert trainer and REQUIRED_CHARS not in trainer  # an option that is given, even empty, changes the file's bytes


def without_the_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train as SentencePiece does by itself."""
    train = training._train
    monkeypatch.setattr(training, "_train", lambda lines, vocab_size, **_: train(lines, vocab_size))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe without a tokenizer, over the text in raw/."""
    monkeypatch.chdir(tmp_path)
    fields = small_recipe(Path())
    fields["data"]["validation_fraction"] = 0
    fields["data"]["sources"] = {"text": {"format": "jsonl", "path": "raw", "weight": 1}}
    Path("recipe.yaml").write_text(yaml.safe_dump(fields))
    return Path("recipe.yaml")


def test_a_vocabulary_that_does_not_decode_text_to_itself_is_not_written(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(Path("raw/a.jsonl"), PROTEIN)
    without_the_symbol(monkeypatch)
    assert cli.main(["--quiet", "tokenizer", "train", str(recipe), "--vocab-size", "350"]) == 2
    assert "tokenizer training: the trained vocabulary does not decode" in capsys.readouterr().err
    assert not Path("tokenizer").exists()


def test_lines_with_the_reserved_character_are_used_and_the_character_is_counted(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = [f"cpu{'▅' * count} throughput\n" for count in range(1, 6)] * 40
    write_jsonl(Path("raw/a.jsonl"), [*load, "memory \t latency"])
    assert cli.main(["--quiet", "tokenizer", "train", str(recipe), "--vocab-size", "292"]) == 0
    tokenizer = Tokenizer.load("tokenizer")
    assert "▁throughput" in tokenizer._file.pieces
    assert tokenizer.decode(tokenizer.encode("cpu▅ 9 %")) == "cpu▅ 9 %"
    said = capsys.readouterr().out
    used = 200 * len("cpu throughput") + len("memory  latency")
    assert f"trained on {used:,} characters" in said
    assert "201 control characters" in said
    assert "600 of U+2585" in said


def test_no_other_character_costs_its_line() -> None:
    """SentencePiece's trainer drops lines without an error, so each line of one character must come back as a piece."""
    lost: list[str] = []
    every = [chr(code) for code in range(0x80, 0x20000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(every), 1500):
        characters = every[start : start + 1500]
        lines = training_text(characters).lines
        model = sentencepiece.SentencePieceProcessor(model_proto=training._train(lines, 259 + len(lines)))
        pieces = {model.id_to_piece(number) for number in range(259, model.vocab_size())}
        lost += [character for character in characters if character not in pieces]
    assert lost == ["▅"]


def test_text_beyond_the_sample_is_counted() -> None:
    texts = python_sources(30)
    text = training_text(texts, num_characters=50_000)
    assert text.num_characters + sum(text.not_used.values()) == sum(map(len, texts))
    assert text.not_used["beyond the sample of 50,000"] > sum(map(len, texts)) / 2


@pytest.mark.parametrize("reserved", ["▅", "▅▅\n▅"])
def test_text_of_reserved_characters_alone_is_refused(reserved: str) -> None:
    with pytest.raises(InputError, match="the texts are empty"):
        train_tokenizer([reserved], 300)
