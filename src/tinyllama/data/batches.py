"""Order and store to the tensors of one rank.

A rank takes its slice of the global batch's rows, so the number of ranks never changes what is learnt from. Reading is
random access in this very process: a step of 2M tokens is 4 MB, and a worker process would cost several times of what
it saves. Ahead of a step only the kernel reads, which is told what comes.
"""

from collections.abc import Collection, Iterator
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from tinyllama.data.order import sequences, sequences_for_steps
from tinyllama.data.store import Span, Split, TokenStore
from tinyllama.recipe import Recipe

Spans = list[tuple[Split, Span]]

_BLOCK_ROWS = 16384
"""Rows at most whose order is worked out together, in about 10 ms; a row alone costs several times its share of it."""


def batches(
    recipe: Recipe,
    store: TokenStore,
    first_step: int,
    rank: int = 0,
    ranks: int = 1,
    left_out: Collection[int] = (),
) -> Iterator[Tensor]:
    """The batches of one rank from step `first_step` to the recipe's last: one `batch_of_step` each, in turn.

    Batches in `left_out` are skipped (see `batch_index_for_step`). While the model trains on one, the kernel
    reads the tokens of the next one. Raises InputError where the batch does not divide among the ranks, and as
    `Split.fetch` does.
    """
    length = recipe.train.sequence_length
    steps = _spans_for_steps(recipe, store, first_step, rank_slice(recipe, rank, ranks), left_out)
    for pieces, _ in pairwise(chain(_with_prefetch(steps), ([],))):  # in pairs: the next is on its way when one is read
        yield _read(pieces, length)


def batch_of_step(recipe: Recipe, store: TokenStore, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """The rows of one rank for a step: int64 [batch_sequences / ranks, sequence_length + 1], inputs and targets.

    Raises InputError where the batch does not divide among the ranks.
    """
    rows, splits = sequences(recipe, store, step)[rank_slice(recipe, rank, ranks)], _splits(recipe, store)
    return torch.cat(
        [read_sequences(splits[source], [index], recipe.train.sequence_length) for source, _, index in rows.tolist()]
    )


def rank_slice(recipe: Recipe, rank: int, ranks: int) -> slice:
    """Which rows of a batch belong to a rank."""
    rows = recipe.train.sequences_per_rank(ranks)
    return slice(rank * rows, (rank + 1) * rows)


def read_sequences(split: Split, indices: list[int], length: int) -> Tensor:
    """Sequences of a split: int64 [len(indices), length + 1], `length` inputs and, one further, their targets."""
    return _read([piece for index in indices for piece in _pieces(split, index, length)], length)


def _read(pieces: Spans, length: int) -> Tensor:
    data = b"".join([split.fetch(*piece) for split, piece in pieces])
    tokens = np.frombuffer(data, pieces[0][0].dtype).reshape(-1, length + 1)
    return torch.from_numpy(tokens.astype(np.int64))


def _pieces(split: Split, index: int, length: int) -> Spans:
    return [(split, piece) for piece in split.pieces(index * length, (index + 1) * length + 1)]


def batch_index_for_step(step: int, left_out: Collection[int]) -> int:
    """Which batch of the order a step learns from: the one that `step` others precede which are not left out."""
    for batch in sorted(left_out):
        step += batch <= step
    return step


def _spans_for_steps(
    recipe: Recipe, store: TokenStore, first_step: int, part: slice, left_out: Collection[int]
) -> Iterator[Spans]:
    """What each step reads, row by row, from `first_step` to the recipe's last."""
    splits, length = _splits(recipe, store), recipe.train.sequence_length
    first, end = batch_index_for_step(first_step, left_out), batch_index_for_step(recipe.train.steps - 1, left_out) + 1
    for start, stop in _blocks(first, end, max(1, _BLOCK_ROWS // recipe.train.batch_sequences)):
        rows = sequences_for_steps(recipe, store, start, stop)[:, part]
        for batch, step in enumerate(zip(rows["source"].tolist(), rows["index"].tolist(), strict=True), start):
            if batch not in left_out:
                pieces = (_pieces(splits[source], index, length) for source, index in zip(*step, strict=True))
                yield list(chain.from_iterable(pieces))


def _blocks(first: int, end: int, longest: int) -> Iterator[tuple[int, int]]:
    """Ranges of steps, twice as long each time up to `longest`: a first batch does not wait for the order of many."""
    size = 1
    while first < end:
        stop = min(first + size, end)
        yield first, stop
        first, size = stop, min(2 * size, longest)


def _with_prefetch(steps: Iterator[Spans]) -> Iterator[Spans]:
    for pieces in steps:
        for split, piece in pieces:
            split.prefetch(*piece)
        yield pieces


def _splits(recipe: Recipe, store: TokenStore) -> list[Split]:
    return [store[f"{name}/train"] for name in recipe.data.sources]
