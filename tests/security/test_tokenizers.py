"""A tokenizer from a stranger does not exhaust the memory, and failures of `tokenizers` are one-line errors."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tests.conftest import python_sources
from tests.vocabularies import train_byte_level
from tokenizers import pre_tokenizers

from tinyllama.errors import InputError
from tinyllama.files import write_json
from tinyllama.tokenizer import Tokenizer

TENFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
HUNGRY = {"type": "Split", "pattern": {"Regex": r"(a+)+$"}, "behavior": "Isolated", "invert": False}


def changed(folder: Path, **fields: Any) -> Path:
    tokenizer = train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), "<s>", "</s>")
    write_json(folder / "tokenizer.json", json.loads(tokenizer.to_str()) | fields)
    return folder


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "."}, "content": "b" * 1000}),
        ("normalizer", {"type": "Sequence", "normalizers": [TENFOLD] * 9}),
        ("normalizer", {"type": "Prepend", "prepend": "x" * 1000}),
        ("decoder", {"type": "Sequence", "decoders": [TENFOLD] * 9 + [BYTES]}),
    ],
)
def test_text_expanding_tokenizer_is_refused(tmp_path: Path, part: str, step: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"its {part} can lengthen a text"):
        Tokenizer.load(changed(tmp_path, **{part: step}))


@pytest.fixture(scope="module")
def charsmap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a SentencePiece model whose rules replace one letter with a thousand."""
    folder = tmp_path_factory.mktemp("charsmap")
    (folder / "rules.tsv").write_text("6F\t" + " ".join(["78"] * 1000) + "\n")  # code points: o, then many x
    lines = [line for text in python_sources(5) for line in text.splitlines() if line.strip()]
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_tsv=str(folder / "rules.tsv"),
            minloglevel=2,
        )
    return folder


def test_text_expanding_sentencepiece_rules_are_refused(charsmap: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="normalization can lengthen a text"):
        Tokenizer.load(charsmap)
    model = sentencepiece_model_pb2.ModelProto.FromString((charsmap / "tokenizer.model").read_bytes())
    rules = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    with pytest.raises(InputError, match="its normalizer can lengthen a text"):
        Tokenizer.load(changed(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": rules}))


def test_endless_pattern_is_refused(tmp_path: Path) -> None:
    steps = [HUNGRY, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    tokenizer = Tokenizer.load(changed(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps}))
    with pytest.raises(InputError, match=r"tokenizer\.json.*fails on a text .*retry-limit"):
        tokenizer.encode("a" * 50_000 + "!")
