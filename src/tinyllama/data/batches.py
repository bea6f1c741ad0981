"""Batches of one rank as tensors, read from the token store in the data order.

Each rank reads its slice of the global batch, so the number of ranks does not change the training data. The training
process itself reads the tokens, at random positions. A step of 2M tokens reads only 4 MB, so a worker process would
cost several times as much time as it saves. The operating system reads the next step's tokens in the background.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyllama.data.order import sequences_for_steps
from tinyllama.data.store import Span, Split, TokenStore
from tinyllama.recipe import Recipe

SplitSpan = tuple[Split, Span]
SplitSequence = tuple[Split, int]
"""A split and the index of a sequence in it."""

_MAX_BLOCK_SEQUENCES = 16384
"""Maximum number of sequences whose order is computed at once, in 10 ms; one computation per step would be slower."""


class Batch(NamedTuple):
    """The sequences of one rank in a step."""

    sequences: Tensor
    """Inputs and, shifted by one, targets: int64 [N, T + 1]."""
    document_starts: Tensor | None
    """For each input, the index in its sequence of its document's first token, 0 if the document began earlier: int32
    [N, T]. None unless the recipe has `train.document_mask`."""


def batches(
    recipe: Recipe,
    store: TokenStore,
    first_step: int,
    rank: int = 0,
    ranks: int = 1,
    skipped_batches: Collection[int] = (),
) -> Iterator[Batch]:
    """Yield one rank's batch of batch_sequences / ranks sequences for each step, from `first_step` to the last step.

    Step s reads batch `batch_index_for_step(s, skipped_batches)` of the data order. While the model trains on a batch,
    the operating system reads the tokens of the next batch. Raises InputError if batch_sequences is not divisible by
    `ranks`, and the same errors as `Split.read_span` and `Split.document_starts`.
    """
    length = recipe.train.sequence_length

    def prefetched() -> Iterator[tuple[list[SplitSequence], list[SplitSpan]]]:
        for own in _sequences_by_step(recipe, store, first_step, rank_slice(recipe, rank, ranks), skipped_batches):
            spans = [span for split, index in own for span in _sequence_spans(split, index, length)]
            for split, span in spans:
                split.prefetch(*span)
                if recipe.train.document_mask:
                    split.prefetch_documents(span[0])
            yield own, spans

    for (own, spans), _ in pairwise(chain(prefetched(), [([], [])])):  # prefetch the next step before reading a step
        starts = read_document_starts(own, length) if recipe.train.document_mask else None
        yield Batch(_read(spans, length), starts)


def rank_slice(recipe: Recipe, rank: int, ranks: int) -> slice:
    """Return the slice of a batch's sequences that a rank reads."""
    count = recipe.train.sequences_per_rank(ranks)
    return slice(rank * count, (rank + 1) * count)


def read_sequences(split: Split, indices: list[int], length: int) -> Tensor:
    """Return sequences of a split as int64 [len(indices), length + 1]; the targets are the inputs shifted by one."""
    return _read([span for index in indices for span in _sequence_spans(split, index, length)], length)


def read_document_starts(sequences: Sequence[SplitSequence], length: int) -> Tensor:
    """Return `Batch.document_starts` of sequences with `length` inputs."""
    starts = [split.document_starts(index * length, (index + 1) * length) for split, index in sequences]
    return torch.from_numpy(np.stack(starts))


def batch_index_for_step(step: int, skipped_batches: Collection[int]) -> int:
    """Return the index, in the data order, of the batch that a step reads; no step reads a skipped batch."""
    index = step
    for skipped in sorted(skipped_batches):
        if skipped <= index:
            index += 1
    return index


def _read(spans: list[SplitSpan], length: int) -> Tensor:
    data = b"".join([split.read_span(*span) for split, span in spans])
    tokens = np.frombuffer(data, spans[0][0].dtype).reshape(-1, length + 1)
    return torch.from_numpy(tokens.astype(np.int64))


def _sequence_spans(split: Split, index: int, length: int) -> list[SplitSpan]:
    return [(split, span) for span in split.spans(index * length, (index + 1) * length + 1)]


def _sequences_by_step(
    recipe: Recipe, store: TokenStore, first_step: int, part: slice, skipped_batches: Collection[int]
) -> Iterator[list[SplitSequence]]:
    """Yield, for each step from `first_step` on, the sequences that the step reads, in order."""
    splits = [store[f"{name}/train"] for name in recipe.data.sources]
    first = batch_index_for_step(first_step, skipped_batches)
    end = batch_index_for_step(recipe.train.steps - 1, skipped_batches) + 1
    for start, stop in _blocks(first, end, max(1, _MAX_BLOCK_SEQUENCES // recipe.train.batch_sequences)):
        order = sequences_for_steps(recipe, store, start, stop)[:, part]
        sources, indices = order["source"].tolist(), order["index"].tolist()
        for batch in range(start, stop):
            if batch not in skipped_batches:
                own = zip(sources[batch - start], indices[batch - start], strict=True)
                yield [(splits[source], index) for source, index in own]


def _blocks(first: int, end: int, max_size: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges of batches, whose size doubles from range to range, up to `max_size`.

    The first range has one batch, so that the first batch does not wait for the order of many batches.
    """
    size = 1
    while first < end:
        stop = min(first + size, end)
        yield first, stop
        first, size = stop, min(2 * size, max_size)
