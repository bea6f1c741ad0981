"""Order and store to the tensors of one rank.

A rank takes its slice of the global batch's rows, so the number of ranks never changes what is learnt from. Reading is
random access into memory maps: a step of 2M tokens touches 4 MB, so nothing is buffered and nothing is read ahead.
"""

import numpy as np
import torch
from torch import Tensor

from tinyllama.data.order import sequences
from tinyllama.data.store import Split, TokenStore
from tinyllama.errors import InputError
from tinyllama.recipe import Recipe


def batch_of_step(recipe: Recipe, store: TokenStore, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """The rows of one rank for a step: int64 [batch_sequences / ranks, sequence_length + 1], inputs and targets.

    Raises InputError where the batch does not divide among the ranks.
    """
    rows = sequences(recipe, store, step)[rank_slice(recipe, rank, ranks)]
    names = list(recipe.data.sources)
    length = recipe.train.sequence_length
    splits = [store[f"{name}/train"] for name in names]
    return stack([read_sequence(splits[row["source"]], int(row["index"]), length) for row in rows])


def rank_slice(recipe: Recipe, rank: int, ranks: int) -> slice:
    """Which rows of a batch belong to a rank."""
    batch = recipe.train.batch_sequences
    if batch % ranks:
        raise InputError(f"train.batch_sequences: {batch} rows do not divide among {ranks} ranks; choose a multiple")
    return slice(rank * batch // ranks, (rank + 1) * batch // ranks)


def read_sequence(split: Split, index: int, length: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Sequence `index`: `length` inputs and, one further, their targets."""
    return split.read(index * length, (index + 1) * length + 1).astype(np.int64)


def stack(rows: "list[np.ndarray[tuple[int], np.dtype[np.int64]]]") -> Tensor:
    """Rows as one tensor int64[rows, length]."""
    return torch.from_numpy(np.stack(rows))
