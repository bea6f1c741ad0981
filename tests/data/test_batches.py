"""A batch is the same batch, however many ranks share it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tinyllama.data.batches import batch_of_step
from tinyllama.data.order import sequences
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.recipe import Recipe


@pytest.fixture
def recipe(small: Path) -> Recipe:
    return Recipe.load(small / "recipe.yaml", {"train.batch_sequences": 24})


@pytest.fixture
def store(small: Path) -> TokenStore:
    return TokenStore.open(small / "store")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_rows_of_any_number_of_ranks_are_the_same_batch(recipe: Recipe, store: TokenStore, ranks: int) -> None:
    for step in (0, 7):
        parts = [batch_of_step(recipe, store, step, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), batch_of_step(recipe, store, step))


def test_a_row_is_the_tokens_that_its_sequence_names(recipe: Recipe, store: TokenStore) -> None:
    rows = sequences(recipe, store, 3)
    batch = batch_of_step(recipe, store, 3)
    assert batch.shape == (24, 65)
    for row, tokens in zip(rows, batch, strict=True):
        split = store[f"{list(recipe.data.sources)[row['source']]}/train"]
        start = int(row["index"]) * 64
        assert np.array_equal(tokens.numpy(), split.read(start, start + 65))


def test_an_epoch_predicts_every_token_once_but_for_the_tail(recipe: Recipe, store: TokenStore) -> None:
    """Token = index proves it: the targets of all sequences are tokens 1 to n x length, each once."""
    split = store["lines/train"]
    targets = np.concatenate([np.arange(i * 64 + 1, i * 64 + 65) for i in range(split.num_sequences(64))])
    assert np.array_equal(targets, np.arange(1, len(targets) + 1))
    assert split.num_tokens - len(targets) <= 64


def test_a_batch_that_does_not_divide_and_a_source_too_short_are_refused(recipe: Recipe, store: TokenStore) -> None:
    with pytest.raises(InputError, match=r"train.batch_sequences: 24 rows do not divide among 5 ranks"):
        batch_of_step(recipe, store, 0, 0, 5)
    long = recipe.model_copy(update={"train": recipe.train.model_copy(update={"sequence_length": 10**7})})
    with pytest.raises(InputError, match=r"modules/train: \d+ tokens are less than one sequence of 10000000"):
        sequences(long, store, 0)
