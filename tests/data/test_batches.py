"""Batches are the same for any number of ranks, and none after the last step is read."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.reading import batch_of_step
from tests.data.test_store_at_size import write_store

from tinyllama.data import batches as module
from tinyllama.data.batches import batches
from tinyllama.data.order import sequences
from tinyllama.data.store import Split, TokenStore
from tinyllama.errors import InputError
from tinyllama.recipe import Recipe


@pytest.fixture
def recipe(small: Path) -> Recipe:
    return Recipe.load(small / "recipe.yaml", {"train.batch_sequences": 24})


@pytest.fixture
def store(small: Path) -> TokenStore:
    return TokenStore.open(small / "store")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_any_number_of_ranks_reads_the_same_batch(recipe: Recipe, store: TokenStore, ranks: int) -> None:
    for step in (0, 7):
        parts = [batch_of_step(recipe, store, step, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), batch_of_step(recipe, store, step))


def test_a_row_has_the_tokens_of_its_sequence(recipe: Recipe, store: TokenStore) -> None:
    rows = sequences(recipe, store, 3)
    batch = batch_of_step(recipe, store, 3)
    assert batch.shape == (24, 65)
    for row, tokens in zip(rows, batch, strict=True):
        split = store[f"{list(recipe.data.sources)[row['source']]}/train"]
        start = int(row["index"]) * 64
        assert np.array_equal(tokens.numpy(), split.read(start, start + 65))


def test_an_epoch_predicts_every_token_once(recipe: Recipe, tmp_path: Path) -> None:
    """Each token of this store is its own index, so that a batch shows what was read."""
    sizes, first_token = {"modules": [20_000, 7, 13_005], "lines": [9_000]}, {"modules": 0, "lines": 40_000}
    folder = write_store(tmp_path / "store", sizes)
    for source, shards in sizes.items():
        numbers = np.arange(sum(shards), dtype="<u2") + first_token[source]
        for number, tokens in enumerate(np.split(numbers, np.cumsum(shards)[:-1])):
            tokens.tofile(folder / source / f"train/{number:05d}.tokens")
    epoch = {source: (sum(shards) - 1) // 64 for source, shards in sizes.items()}
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens": 24 * 64 * 40})})
    rows = torch.cat([batch.sequences for batch in batches(longer, TokenStore.open(folder), 0)]).numpy()
    for source, count in epoch.items():
        own = rows[(rows[:, 0] >= 40_000) == (source == "lines")][:count] - first_token[source]
        assert np.array_equal(np.sort(own[:, 1:].ravel()), np.arange(1, count * 64 + 1))
        assert np.array_equal(own[:, 1:], own[:, :-1] + 1)
        assert sum(sizes[source]) - 1 - count * 64 < 64


@pytest.mark.parametrize("skipped", [set(), {0, 3, 4, 5, 6, 11, 12, 99}], ids=["all", "skipped"])
@pytest.mark.parametrize(("first_step", "ranks"), [(0, 1), (0, 3), (5, 2), (9, 8), (10, 1)])
def test_batches_are_those_of_the_steps_up_to_the_last(
    recipe: Recipe,
    store: TokenStore,
    monkeypatch: pytest.MonkeyPatch,
    first_step: int,
    ranks: int,
    skipped: set[int],
) -> None:
    """Skipped batches do not change the number of steps."""
    monkeypatch.setattr(module, "_MAX_BLOCK_SEQUENCES", 24 * 3)  # several blocks, of which the last one is short
    assert recipe.train.steps == 10
    expected = [batch for batch in range(20) if batch not in skipped][first_step:10]
    for rank in range(ranks):
        read = [batch.sequences for batch in batches(recipe, store, first_step, rank, ranks, skipped)]
        assert len(read) == len(expected)
        for batch, rows in zip(expected, read, strict=True):
            assert rows.dtype == torch.int64
            assert torch.equal(rows, batch_of_step(recipe, store, batch, rank, ranks))


def test_the_first_block_has_one_step() -> None:
    assert [*module._blocks(5, 20, 4)] == [(5, 6), (6, 8), (8, 12), (12, 16), (16, 20)]


def test_the_next_step_is_prefetched_and_none_after_the_last(
    recipe: Recipe, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *advice: advised.append(advice))
    counts = [len(advised) for _ in batches(recipe, store, 4, 1, 3)]
    assert counts == [8 * num_steps for num_steps in (2, 3, 4, 5, 6, 6)]
    indices = [index for step in range(4, 10) for index in sequences(recipe, store, step)[8:16]["index"].tolist()]
    assert advised == [(index * 64 * 2, 65 * 2, os.POSIX_FADV_WILLNEED) for index in indices]


def test_a_file_truncated_during_training_is_named(recipe: Recipe, small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "store", tmp_path / "store")
    reading = batches(recipe, TokenStore.open(tmp_path / "store"), 0)
    next(reading)
    os.truncate(tmp_path / "store/modules/train/00000.tokens", 10)
    with pytest.raises(InputError, match=r"store/modules/train/00000.tokens: ends at byte"):
        next(reading)


def test_a_source_without_a_share_may_be_empty(recipe: Recipe, store: TokenStore) -> None:
    def too_short(self: Split, length: int) -> int:
        return 0 if self.folder.parent.name == "lines" else 1000

    fields: dict[str, Any] = {"data.sources.lines.weight": 0, "train.batch_sequences": 24}
    alone = Recipe.load(store.folder.parent / "recipe.yaml", fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Split, "num_sequences", too_short)
        assert (sequences(alone, store, 3)["source"] == 0).all()
        with pytest.raises(InputError, match="lines/train: "):
            sequences(recipe, store, 3)


def test_indivisible_batches_and_short_sources_are_refused(recipe: Recipe, store: TokenStore) -> None:
    with pytest.raises(InputError, match=r"train.batch_sequences: 24 .*5 ranks"):
        batch_of_step(recipe, store, 0, 0, 5)
    long = recipe.model_copy(update={"train": recipe.train.model_copy(update={"sequence_length": 10**7})})
    with pytest.raises(InputError, match=r"modules/train: .*10000000"):
        sequences(long, store, 0)
