"""Which sequences step s reads: pure functions of (seed, sources, mix, step), no state, no torch.

A resumed run asks for its step and has it; the cost is the same at any step. Per source and epoch the order is a keyed
permutation of all its sequences, so an epoch reads each exactly once; the mix is exact in every batch to within a row.
Consecutive steps cost less together: a source's places in them follow each other and are permuted in one go.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

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
_RAMP_STEPS = 64


@dataclass(frozen=True, eq=False)  # the same only as itself: hashing a ramp's fractions would take longer than a step
class Mixture:
    """Shares of the sources from a step on."""

    first_step: int
    shares: tuple[Fraction, ...]
    """One a source, summing to 1."""


@dataclass(frozen=True)
class _Grid:
    """What the rows of any step follow from: M mixes of K sources on the grid of a batch."""

    first_steps: NDArray[np.int64]
    """[M]"""
    edges: NDArray[np.int64]
    """[M, K + 1]: in mix m source k owns the grid points from edges[m, k] to edges[m, k + 1]."""
    given: tuple[list[int], ...]
    """M times K: rows that each source has given before the mix begins."""


def sequences(recipe: Recipe, store: TokenStore, step: int) -> NDArray[np.void]:
    """The rows of step `step` (counted from 0): an array of (source, epoch, index), `batch_sequences` long.

    `source` counts the recipe's sources in their order; sequence `index` starts at token index x sequence_length.
    Raises InputError where a source has less than one sequence.
    """
    rows: NDArray[np.void] = sequences_for_steps(recipe, store, step, step + 1)[0]
    return rows


def sequences_for_steps(recipe: Recipe, store: TokenStore, first_step: int, last_step: int) -> NDArray[np.void]:
    """`sequences` of the steps from `first_step` to before `last_step`: [steps, batch_sequences]."""
    if first_step < 0:
        raise ValueError(f"step {first_step}: steps count from 0")
    names, mixing = list(recipe.data.sources), mixture_schedule(recipe)
    used = [any(mix.shares[source] for mix in mixing) for source in range(len(names))]
    counts = [_num_sequences(recipe, store, name, needed) for name, needed in zip(names, used, strict=True)]
    return rows_for_steps(recipe.seed, names, counts, mixing, recipe.train.batch_sequences, first_step, last_step)


def mixture_schedule(recipe: Recipe) -> tuple[Mixture, ...]:
    """The recipe's mixes in the order in which they hold; the first begins at step 0, a ramp is up to 64 of them."""
    sources = recipe.data.sources
    stages = tuple(
        (stage.from_tokens, stage.ramp_tokens, tuple(stage.weights.get(name, 0.0) for name in sources))
        for stage in recipe.data.stages
    )
    return _mixes(tuple(source.weight for source in sources.values()), stages, recipe.train.batch_tokens)


@lru_cache(maxsize=16)
def _mixes(
    weights: tuple[float, ...], stages: tuple[tuple[int, int, tuple[float, ...]], ...], batch_tokens: int
) -> tuple[Mixture, ...]:
    found = [Mixture(0, _shares(weights))]
    for from_tokens, ramp_tokens, weights_after in stages:
        before, after = found[-1].shares, _shares(weights_after)
        first_step, last_step = -(-from_tokens // batch_tokens), -(-(from_tokens + ramp_tokens) // batch_tokens)
        found += _ramp(before, after, first_step, last_step)
        found.append(Mixture(last_step, after))
    # Of two mixes that begin at one step, the later holds.
    return tuple(
        mix
        for mix, following in zip(found, [*found[1:], None], strict=True)
        if not following or following.first_step > mix.first_step
    )


def _ramp(before: tuple[Fraction, ...], after: tuple[Fraction, ...], first_step: int, last_step: int) -> list[Mixture]:
    """Equal pieces of the straight line between two mixes, each held at its middle: in sum they give what it gives."""
    pieces = min(_RAMP_STEPS, last_step - first_step)
    ramp = []
    for piece in range(pieces):
        way = Fraction(2 * piece + 1, 2 * pieces)
        shares = tuple(old + (new - old) * way for old, new in zip(before, after, strict=True))
        ramp.append(Mixture(first_step + piece * (last_step - first_step) // pieces, shares))
    return ramp


def rows_for_steps(
    seed: int,
    names: Sequence[str],
    num_sequences: Sequence[int],
    mixes: Sequence[Mixture],
    batch: int,
    first_step: int,
    last_step: int,
) -> NDArray[np.void]:
    """`sequences_for_steps` from bare arguments: sources' names and numbers of sequences, mixes, rows a batch."""
    counts = _counts(_grid(tuple(mixes), batch), first_step, last_step)
    rows = np.empty(counts.sum(), ROW)
    rows["source"] = np.repeat(np.tile(np.arange(len(names)), len(counts)), counts.ravel())
    starts = rows_consumed_before(mixes, batch, first_step)
    for source, (start, count) in enumerate(zip(starts, counts.sum(axis=0).tolist(), strict=True)):
        if count:
            own = rows["source"] == source
            size = num_sequences[source]
            rows["epoch"][own] = np.arange(start, start + count) // size
            rows["index"][own] = _indices(seed, names[source], size, start, start + count)
    return rows.reshape(len(counts), batch)


def _indices(seed: int, name: str, size: int, start: int, stop: int) -> NDArray[np.int64]:
    """The sequences at places `start` to `stop` of a source's endless order, which is one permutation an epoch."""
    parts = []
    for epoch in range(start // size, -(-stop // size)):
        places = np.arange(max(start, epoch * size), min(stop, (epoch + 1) * size)) - epoch * size
        parts.append(permute(places, size, _key(seed, name, epoch)))
    return np.concatenate(parts)


def rows_consumed_before(mixes: Sequence[Mixture], batch: int, step: int) -> list[int]:
    """How many rows each source has given in all steps before `step`."""
    grid = _grid(tuple(mixes), batch)
    number = bisect_right(grid.first_steps, step) - 1
    given = _rows_of_mix(grid.edges[number].tolist(), step - int(grid.first_steps[number]))
    return [before + more for before, more in zip(grid.given[number], given, strict=True)]


@lru_cache(maxsize=16)
def _grid(mixes: tuple[Mixture, ...], batch: int) -> _Grid:
    first_steps = [mix.first_step for mix in mixes]
    edges = [[round(batch * _PERIOD * edge) for edge in accumulate(mix.shares, initial=Fraction(0))] for mix in mixes]
    given = [[0] * len(mixes[0].shares)]
    for own_edges, (start, end) in zip(edges, pairwise(first_steps), strict=False):
        given.append([sum(both) for both in zip(given[-1], _rows_of_mix(own_edges, end - start), strict=True)])
    return _Grid(np.array(first_steps), np.array(edges), tuple(given))


def _counts(grid: _Grid, first_step: int, last_step: int) -> NDArray[np.int64]:
    """Rows of each source in each step: [steps, sources].

    Step m of a mix gives a source as many rows as it owns points x with x = m g modulo the period: its points over the
    period, rounded down or up.
    """
    steps = np.arange(first_step, last_step)
    mix = np.searchsorted(grid.first_steps, steps, "right") - 1
    offsets = (steps - grid.first_steps[mix]) * _GOLDEN % _PERIOD
    return np.diff((grid.edges[mix] - 1 - offsets[:, None]) // _PERIOD)


def _rows_of_mix(edges: list[int], steps: int) -> list[int]:
    """Rows of each source in the first `steps` steps of a mix: the sums of `_counts`, which are sums of floors."""
    below = [_floor_sum(steps, _PERIOD, -_GOLDEN, edge - 1) for edge in edges]
    return [high - low for low, high in pairwise(below)]


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
        left, right = right, left ^ (_mix64(right ^ np.uint64(round_key)) & mask)
    return (left << half) | right


def _mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014); products wrap around by intention."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@lru_cache(maxsize=256)
def _key(seed: int, name: str, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{name}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _num_sequences(recipe: Recipe, store: TokenStore, name: str, needed: bool) -> int:
    split, length = store[f"{name}/train"], recipe.train.sequence_length
    count = split.num_sequences(length)
    if needed and not count:
        raise InputError(
            f"{split.folder}: {split.num_tokens} tokens are less than one sequence of {length} and its targets; "
            "add text or shorten train.sequence_length"
        )
    return count


def _shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    exact = [Fraction(str(weight)) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)
