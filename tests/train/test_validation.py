"""Validation: the sequences, bits per byte of the text itself by source and position, and gzip on the same text."""

import gzip
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import python_sources
from tests.data.reading import documents_of
from tests.train.single_process import SINGLE_PROCESS, build_state, load_recipe
from tests.train.torchrun import train_recipes, write_recipe
from torch import Tensor
from torch.nn import functional as F

from tinyllama.data.order import num_validation_sequences
from tinyllama.data.store import TokenStore
from tinyllama.model.llama import Llama
from tinyllama.preflight import recipe_warnings
from tinyllama.prepare.selection import hash_to_unit_interval
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.training import train_tokenizer, training_text
from tinyllama.train.validation import (
    ValidationScore,
    gzip_bits_per_byte,
    load_validation_set,
    position_ranges,
    read_validation_sequences,
    target_bytes,
    validate,
)


@pytest.fixture
def recipe(small: Path) -> Recipe:
    return load_recipe(small, **{"train.validation_sequences": 20})


def test_target_bytes_are_the_documents_without_bos_eos_and_dummy_spaces(small: Path, recipe: Recipe) -> None:
    state = build_state(recipe)
    split = state.store["lines/validation"]
    all_tokens = torch.from_numpy(split.read(0, split.num_tokens).astype("int64"))[None]
    texts = [json.loads(line)["text"] for line in (small / "raw/lines/a.jsonl").open()]
    held_out = "".join(text for text in texts if hash_to_unit_interval(text) < 0.1)
    assert len(held_out) > 10_000
    assert target_bytes(all_tokens, state.tokenizer).decode() == held_out


def test_first_space_of_a_document_counts_unless_the_tokenizer_adds_it(small: Path) -> None:
    byte_level = train_tokenizer(training_text(python_sources(3), kind="bytelevel"), 300)
    for tokenizer, expected in ((byte_level, " x  y"), (Tokenizer.load(small / "tokenizer"), "x  y")):
        texts = [" x", "  y"] if tokenizer is byte_level else ["x", "  y"]
        documents = tokenizer.encode_documents(texts)
        ids = [number for document in documents for number in document.tolist()]
        assert target_bytes(torch.tensor([ids]), tokenizer).decode() == expected


def test_sequences_are_divided_by_weight_and_spread_over_the_split(small: Path, recipe: Recipe) -> None:
    store = TokenStore.open(small / "store")
    sequences = torch.cat(list(read_validation_sequences(recipe, store).values()))
    assert sequences.shape == (20, 65)
    split = store["modules/validation"]
    starts = [i * split.num_sequences(64) // 14 * 64 for i in range(14)]
    assert sequences[:14].tolist() == [split.read(start, start + 65).tolist() for start in starts]


@torch.no_grad()
@pytest.mark.parametrize("micro_batch_size", [3, 20, 64])  # a pass that is not full, or has two sources
def test_scores_are_bits_over_bytes_of_all_sequences_and_of_each_source(recipe: Recipe, micro_batch_size: int) -> None:
    state = build_state(recipe)
    assert state.validation_set is not None
    sequences = state.validation_set.sequences
    logits = state.model(sequences[:, :-1]).transpose(1, 2)
    nats = F.cross_entropy(logits, sequences[:, 1:], reduction="none").double()
    score = validate(state.model, state.validation_set, micro_batch_size, SINGLE_PROCESS)
    assert list(score.sources) == ["modules", "lines"]
    for found, part in (
        (score, slice(20)),
        (score.sources["modules"], slice(14)),
        (score.sources["lines"], slice(14, 20)),
    ):
        assert found.loss == pytest.approx(float(nats[part].mean()), rel=1e-5)
        num_bytes = len(target_bytes(sequences[part], state.tokenizer))
        assert found.bits_per_byte == pytest.approx(float(nats[part].sum()) / math.log(2) / num_bytes, rel=1e-5)
    mean = (14 * score.sources["modules"].loss + 6 * score.sources["lines"].loss) / 20
    assert score.loss == pytest.approx(mean, rel=1e-6)
    assert score.loss == loss_without_sources(state.model, sequences, micro_batch_size)


@given(length=st.integers(1, 10_000))
def test_position_ranges_cover_a_sequence_and_begin_alike_at_every_length(length: int) -> None:
    ranges = position_ranges(length)
    assert [position for part in ranges for position in part] == list(range(length))
    assert len(ranges) == 1 or length >= 512
    for part in ranges[1:]:
        assert len(part) >= part.start
        assert part.start >= 256 and part.start.bit_count() == 1


LONG = {"model.context_length": 1024, "train.sequence_length": 1024, "train.validation_sequences": 5}


@torch.no_grad()
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("micro_batch_size", [2, 5])
def test_scores_by_position_equal_a_direct_computation_and_sum_to_the_total(
    small: Path, micro_batch_size: int, document_mask: bool
) -> None:
    state = build_state(load_recipe(small, **LONG, **{"train.document_mask": document_mask}))
    assert state.validation_set is not None
    sequences, tokenizer = state.validation_set.sequences, state.tokenizer
    positions, nats = list[int](), torch.empty(len(sequences), 1024, dtype=torch.float64)
    for row, ids in enumerate(sequences):  # each document alone
        begins = [0, *(index for index in range(1, 1024) if document_mask and ids[index] == tokenizer.bos_id), 1024]
        for begin, end in itertools.pairwise(begins):
            positions += range(end - begin)
            logits = state.model(ids[None, begin:end])[0]
            nats[row, begin:end] = F.cross_entropy(logits, ids[begin + 1 : end + 1], reduction="none").double()
    score = validate(state.model, state.validation_set, micro_batch_size, SINGLE_PROCESS)
    pairs = torch.stack([sequences[:, :-1], sequences[:, 1:]], 2).view(-1, 1, 2)
    sizes = [len(target_bytes(pair, tokenizer)) for pair in pairs]
    for name, first, last in (("0-255", 0, 255), ("256-511", 256, 511), ("512-1023", 512, 1023)):
        own = [index for index, position in enumerate(positions) if first <= position <= last]
        assert score.positions[name].loss == pytest.approx(float(nats.view(-1)[own].mean()), rel=1e-5)
        bits = float(nats.view(-1)[own].sum()) / math.log(2)
        assert score.positions[name].bits_per_byte == pytest.approx(bits / sum(sizes[i] for i in own), rel=1e-5)
    assert list(score.positions) == ["0-255", "256-511", "512-1023"]
    assert sum(sizes) == len(target_bytes(sequences, tokenizer))
    assert score.loss == pytest.approx(float(nats.mean()), rel=1e-5)
    assert (max(positions) == 1023) and (positions.count(0) > 10) == document_mask


def test_short_sequences_have_no_scores_by_position(recipe: Recipe) -> None:
    state = build_state(recipe)
    assert state.validation_set is not None
    assert validate(state.model, state.validation_set, 20, SINGLE_PROCESS).positions == {}


def test_parts_of_a_validation_have_different_columns() -> None:
    part = ValidationScore(1.0, 2.0)
    score = ValidationScore(3.0, 4.0, {"0-255": part, "by_position": part}, {"0-255": part})
    parts = ("", "/0-255", "/by_position", "_by_position/0-255")
    columns = {f"validation_{metric}{part}" for metric in ("loss", "bits_per_byte") for part in parts}
    assert score.metrics().keys() == columns


@pytest.mark.slow
def test_scores_by_position_do_not_depend_on_the_number_of_ranks(small: Path, tmp_path: Path) -> None:
    fields: dict[str, object] = {**LONG, "train.batch_sequences": 2, "train.micro_batch_sequences": 1}
    fields |= {"train.tokens": 2048, "train.schedule.warmup_steps": 0}
    for ranks in (1, 2):
        train_recipes(tmp_path, ranks, [write_recipe(tmp_path, small, f"ranks-{ranks}", **fields)])
    (one,), (two,) = (RunDir(tmp_path / f"runs/ranks-{ranks}").metrics() for ranks in (1, 2))
    by_position = [name for name in one if "_by_position/" in name]
    assert len(by_position) == 6
    assert [two[name] for name in by_position] == pytest.approx([one[name] for name in by_position], rel=1e-5)


def loss_without_sources(model: Llama, sequences: Tensor, micro_batch_size: int) -> float:
    """Return the mean loss from the float32 sum of each forward pass, as before each source had its own score."""
    nats = torch.zeros((), dtype=torch.float64)
    for part in sequences.split(micro_batch_size):
        padded = F.pad(part, (0, 0, 0, micro_batch_size - len(part)))
        nats += model.loss(padded[:, :-1], part[:, 1:]).double()
    return nats.item() / sequences[:, 1:].numel()


def test_gzip_weights_the_sources_like_the_sequences(small: Path, recipe: Recipe) -> None:
    store, tokenizer = TokenStore.open(small / "store"), Tokenizer.load(recipe.tokenizer)
    bits = size = 0.0
    for name, sequences in read_validation_sequences(recipe, store).items():
        documents = [tokenizer.decode(ids[1:-1].tolist()) for ids in documents_of(store[f"{name}/validation"])]
        text = "".join(documents).encode()
        num_bytes = len(target_bytes(sequences, tokenizer))
        bits, size = bits + num_bytes * 8 * len(gzip.compress(text, 9)) / len(text), size + num_bytes
    assert gzip_bits_per_byte(recipe, store, tokenizer) == pytest.approx(bits / size)


def test_source_with_too_little_validation_text_is_named_and_excluded(small: Path) -> None:
    recipe = load_recipe(small, **{"train.sequence_length": 128})
    store = TokenStore.open(small / "store")
    store.splits["lines/validation"].ends[-1] = 100  # as if 100 tokens were held out
    (warning,) = recipe_warnings(recipe, store=store)
    assert warning.startswith(f"{recipe.data.store}/lines: ")
    found = load_validation_set(recipe, store, Tokenizer.load(recipe.tokenizer))
    assert found is not None
    assert list(found.sources) == list(read_validation_sequences(recipe, store)) == ["modules"]


def test_source_without_weight_in_the_first_mixture_is_not_validated(small: Path) -> None:
    stage = {"from_tokens": 1000, "weights": {"lines": 1}}
    recipe = load_recipe(small, **{"data.sources.lines.weight": 0, "data.stages": [stage]})
    assert num_validation_sequences(recipe, {"modules": 9, "lines": 9}) == {"modules": 9}
    recipe = load_recipe(small, **{"data.stages": [stage]})
    assert num_validation_sequences(recipe, {"modules": 9, "lines": 9}) == {"modules": 9, "lines": 3}
