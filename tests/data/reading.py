"""A rank's batch, read sequence by sequence: the reference for `batches`; the documents of a split."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyllama.data.batches import rank_slice, read_sequences
from tinyllama.data.order import sequences
from tinyllama.data.store import Split, TokenStore
from tinyllama.recipe import Recipe


def batch_of_step(recipe: Recipe, store: TokenStore, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """Return one rank's sequences of a step: int64 [batch_sequences / ranks, sequence_length + 1]."""
    splits = [store[f"{name}/train"] for name in recipe.data.sources]
    own = sequences(recipe, store, step)[rank_slice(recipe, rank, ranks)].tolist()
    return torch.cat(
        [read_sequences(splits[source], [index], recipe.train.sequence_length) for source, _, index in own]
    )


def documents_of(split: Split) -> list[NDArray[Any]]:
    """Return the tokens of each document, in order."""
    found = split.find_documents(range(split.num_documents))
    return [split.read(one.start, one.start + one.tokens) for one in found]
