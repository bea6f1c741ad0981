"""Bits per byte are of the text's own bytes, and gzip gets the same ones."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from tests.train.single_process import SINGLE_PROCESS, build_state
from torch.nn import functional as F

from tinyllama.data.store import TokenStore
from tinyllama.preflight import recipe_warnings
from tinyllama.prepare.selection import hash_to_unit_interval
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.validation import (
    gzip_bits_per_byte,
    read_validation_sequences,
    target_bytes,
    validate,
)


def recipe_of(small: Path, rows: int) -> Recipe:
    return Recipe.load(small / "recipe.yaml", {"train.validation_sequences": rows})


def test_the_bytes_are_those_of_the_documents_without_markers_or_dummy_spaces(small: Path) -> None:
    trainer = build_state(recipe_of(small, 20))
    split = trainer.store["lines/validation"]
    whole = torch.from_numpy(split.read(0, split.num_tokens).astype("int64"))[None]
    texts = [json.loads(line)["text"] for line in (small / "raw/lines/a.jsonl").open()]
    held_out = "".join(text for text in texts if hash_to_unit_interval(text) < 0.1)
    assert len(held_out) > 10_000
    assert target_bytes(whole, trainer.tokenizer).decode() == held_out


def test_the_rows_are_shared_out_by_weight_and_never_trained_on(small: Path) -> None:
    recipe, store = recipe_of(small, 20), TokenStore.open(small / "store")
    rows = torch.cat(list(read_validation_sequences(recipe, store).values()))
    assert rows.shape == (20, 65)
    split = store["modules/validation"]
    starts = [i * split.num_sequences(64) // 14 * 64 for i in range(14)]
    expected = [split.read(start, start + 65).tolist() for start in starts]
    assert rows[:14].tolist() == expected


@torch.no_grad()
def test_a_score_is_all_bits_over_all_bytes(small: Path) -> None:
    trainer = build_state(recipe_of(small, 20))
    assert trainer.validation_set is not None
    rows = trainer.validation_set.sequences
    nats = F.cross_entropy(trainer.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    text = target_bytes(rows, trainer.tokenizer)
    for micro_batch in (3, 20, 64):  # a last pass that is not full changes nothing
        score = validate(trainer.model, trainer.validation_set, micro_batch, SINGLE_PROCESS)
        assert score.loss == pytest.approx(float(nats) / (20 * 64), rel=1e-5)
        assert score.bits_per_byte == pytest.approx(float(nats) / math.log(2) / len(text), rel=1e-5)


def test_gzip_gets_the_sources_in_the_rows_proportion(small: Path) -> None:
    recipe, store = recipe_of(small, 20), TokenStore.open(small / "store")
    tokenizer = Tokenizer.load(recipe.tokenizer)
    bits = size = 0.0
    for name, rows in read_validation_sequences(recipe, store).items():
        documents = [tokenizer.decode(ids[1:-1].tolist()) for ids in store[f"{name}/validation"].documents()]
        text = "".join(documents).encode()
        share = len(target_bytes(rows, tokenizer))
        bits, size = bits + share * 8 * len(gzip.compress(text, 9)) / len(text), size + share
    assert gzip_bits_per_byte(recipe, store, tokenizer) == pytest.approx(bits / size)


def test_a_source_with_too_little_held_out_is_named_and_the_others_are_validated(small: Path) -> None:
    recipe = Recipe.load(small / "recipe.yaml", {"train.sequence_length": 128})
    store = TokenStore.open(small / "store")
    store.splits["lines/validation"].ends[-1] = 100  # as if 100 tokens were held out
    (warning,) = recipe_warnings(recipe, store=store)
    assert warning.startswith(f"{recipe.data.store}/lines: too little held out")
    assert list(read_validation_sequences(recipe, store)) == ["modules"]
