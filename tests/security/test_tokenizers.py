"""A stranger's tokenizer.json fills no memory and ends in one line where its library fails."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.vocabularies import train_byte_level
from tokenizers import pre_tokenizers

from tinyllama.errors import InputError
from tinyllama.files import write_json
from tinyllama.tokenizer import Tokenizer

TENFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
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
        ("decoder", {"type": "Sequence", "decoders": [TENFOLD] * 9 + [{"type": "ByteLevel"}]}),
    ],
)
def test_one_that_makes_texts_far_longer_is_refused(tmp_path: Path, part: str, step: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"its {part} can make a text more than 100 times as long"):
        Tokenizer.load(changed(tmp_path, **{part: step}))


def test_one_whose_pattern_never_comes_to_an_end_is_one_line(tmp_path: Path) -> None:
    steps = [HUNGRY, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    tokenizer = Tokenizer.load(changed(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps}))
    with pytest.raises(InputError, match=r"tokenizer\.json.*fails on a text .*retry-limit"):
        tokenizer.encode("a" * 50_000 + "!")
