"""Which sequences step s reads: pure functions of (seed, sources, mix, step), no state, no torch.

A resumed run asks for its step and has it; the cost is the same at any step. Per source and epoch the order is a keyed
permutation of all its sequences, so an epoch reads each exactly once; the mix is exact in every batch to within a row.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.recipe import Recipe

ROW = np.dtype([("source", "<i4"), ("epoch", "<i8"), ("index", "<i8")])

# The mix is apportioned on a grid of 2^32 points a row. Step m's grid is shifted by m x the golden ratio of the period,
# which spreads each source's extra rows most evenly over the steps (Weyl 1916; Knuth, TAOCP 3, 6.4).
_PERIOD = 1 << 32
_GOLDEN = 2654435769
_ROUNDS = 8


@dataclass(frozen=True)
class Mix:
    """Shares of the sources from a step on."""

    first_step: int
    shares: tuple[Fraction, ...]
    """One a source, summing to 1."""


def sequences(recipe: Recipe, store: TokenStore, step: int) -> NDArray[np.void]:
    """The rows of step `step` (counted from 0): an array of (source, epoch, index), `batch_sequences` long.

    `source` counts the recipe's sources in their order; sequence `index` starts at token index x sequence_length.
    Raises InputError where a source has less than one sequence.
    """
    if step < 0:
        raise ValueError(f"step {step}: steps count from 0")
    counts = [_num_sequences(recipe, store, name) for name in recipe.data.sources]
    return rows_of_step(
        recipe.seed, list(recipe.data.sources), counts, mixes(recipe), recipe.train.batch_sequences, step
    )


def mixes(recipe: Recipe) -> list[Mix]:
    """The recipe's mixes in the order in which they hold; the first begins at step 0."""
    sources = recipe.data.sources
    found = [Mix(0, _shares([source.weight for source in sources.values()]))]
    for stage in recipe.data.stages:
        first_step = -(-stage.from_tokens // recipe.train.batch_tokens)
        found.append(Mix(first_step, _shares([stage.weights.get(name, 0.0) for name in sources])))
    # Of two stages that begin at one step, the later holds.
    return [
        mix
        for mix, after in zip(found, [*found[1:], None], strict=True)
        if not after or after.first_step > mix.first_step
    ]


def rows_of_step(
    seed: int, names: Sequence[str], num_sequences: Sequence[int], mixes: Sequence[Mix], batch: int, step: int
) -> NDArray[np.void]:
    """`sequences` from its bare arguments: sources' names and numbers of sequences, mixes, rows a batch."""
    starts, ends = rows_before(mixes, batch, step), rows_before(mixes, batch, step + 1)
    rows = np.empty(batch, ROW)
    filled = 0
    for source, (start, end) in enumerate(zip(starts, ends, strict=True)):
        positions = np.arange(start, end, dtype=np.int64)
        part = rows[filled : filled + len(positions)]
        part["source"] = source
        part["epoch"], places = np.divmod(positions, num_sequences[source])
        for epoch in np.unique(part["epoch"]):
            chosen = part["epoch"] == epoch
            key = _key(seed, names[source], int(epoch))
            part["index"][chosen] = permute(places[chosen], num_sequences[source], key)
        filled += len(positions)
    return rows


def rows_before(mixes: Sequence[Mix], batch: int, step: int) -> list[int]:
    """How many rows each source has given in all steps before `step`."""
    totals = [0] * len(mixes[0].shares)
    for mix, after in zip(mixes, [*mixes[1:], None], strict=True):
        last = step if after is None else min(step, after.first_step)
        given = _rows_of_mix(mix.shares, batch, max(0, last - mix.first_step))
        totals = [total + more for total, more in zip(totals, given, strict=True)]
    return totals


def _rows_of_mix(shares: tuple[Fraction, ...], batch: int, steps: int) -> list[int]:
    """Rows of each source in the first `steps` steps of a mix.

    Source k owns the grid points from edge k to edge k + 1. Step m gives it as many rows as it owns points x with
    x = m g modulo the period: its points over the period, rounded down or up. Sums of that are sums of floors.
    """
    edges = [round(batch * _PERIOD * sum(shares[:k], Fraction(0))) for k in range(len(shares) + 1)]
    below = [_floor_sum(steps, _PERIOD, -_GOLDEN, edge - 1) for edge in edges]
    return [high - low for low, high in itertools.pairwise(below)]


def _floor_sum(count: int, modulus: int, factor: int, offset: int) -> int:
    """Sum of floor((factor i + offset) / modulus) for i from 0 to count - 1, in O(log modulus).

    Euclid's algorithm on the lattice points under a line (Graham, Knuth, Patashnik: Concrete Mathematics, 3.5).
    """
    total = 0
    while True:
        quotient, factor = divmod(factor, modulus)
        total += quotient * (count * (count - 1) // 2)
        quotient, offset = divmod(offset, modulus)
        total += quotient * count
        top = factor * count + offset
        if top < modulus:
            return total
        count, offset = divmod(top, modulus)
        modulus, factor = factor, modulus


def permute(places: NDArray[np.int64], size: int, key: Sequence[int]) -> NDArray[np.int64]:
    """Map places of [0, size) to where a permutation chosen by `key` puts them.

    A balanced Feistel network (Luby and Rackoff 1988) on the next power of four, walked until it falls inside
    (Black and Rogaway 2002), four walks on average at most; `key` holds one 64-bit number a round.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], half, mask, key)
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: np.uint64, mask: np.uint64, key: Sequence[int]) -> NDArray[np.uint64]:
    left, right = values >> half, values & mask
    for round_key in key:
        left, right = right, left ^ (_scramble(right ^ np.uint64(round_key)) & mask)
    return (left << half) | right


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014); products wrap around by intention."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=256)
def _key(seed: int, name: str, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{name}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _num_sequences(recipe: Recipe, store: TokenStore, name: str) -> int:
    split, length = store[f"{name}/train"], recipe.train.sequence_length
    count = split.num_sequences(length)
    if not count:
        raise InputError(
            f"{split.folder}: {split.num_tokens} tokens are less than one sequence of {length} and its targets; "
            "add text or shorten train.sequence_length"
        )
    return count


def _shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    exact = [Fraction(str(weight)) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)
