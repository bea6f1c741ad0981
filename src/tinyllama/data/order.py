"""Data order: the sequences that each training step reads, as a pure function of (seed, sources, mixtures, step).

The sequences of any step are computed directly, so resuming takes the same time at every step. This module has no state
and does not import torch. In each epoch of a source, a keyed permutation orders the source's sequences, so an epoch
reads each sequence once. In every batch, the number of sequences of a source is the source's exact share, rounded down
or up. One call for many consecutive steps is faster than one call per step.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.recipe import Recipe

SEQUENCE_DTYPE = np.dtype([("source", "<i4"), ("epoch", "<i8"), ("index", "<i8")])

_GRID_POINTS = 1 << 32
"""Number of grid points per sequence, for the division of a batch among sources (see `_num_sequences_by_step`)."""
_GOLDEN_OFFSET = 2654435769
"""Shift of the grid points from one step to the next: `_GRID_POINTS` divided by the golden ratio (Weyl 1916; Knuth,
TAOCP 3, 6.4)."""
_FEISTEL_ROUNDS = 8
_MAX_RAMP_STEPS = 64


@dataclass(frozen=True, eq=False)  # compared by identity, since hashing the fractions of a ramp is slow
class Mixture:
    """Shares of the sources in each batch, from step `first_step` until the next mixture begins."""

    first_step: int
    shares: tuple[Fraction, ...]
    """Share of each source; the shares sum to 1."""


@dataclass(frozen=True)
class _Grid:
    """Division of a batch among K sources in each of M mixtures; see `_num_sequences_by_step`."""

    first_steps: NDArray[np.int64]
    """First step of each mixture: [M]."""
    edges: NDArray[np.int64]
    """Edges of the intervals of grid points: [M, K + 1]; in mixture m, source k has [edges[m, k], edges[m, k + 1])."""
    consumed: tuple[list[int], ...]
    """Number of sequences of each source that are read before each mixture begins: M lists of K numbers."""


def sequences(recipe: Recipe, store: TokenStore, step: int) -> NDArray[np.void]:
    """Return the sequences of step `step` (counted from 0): [batch_sequences], each (source, epoch, index).

    `source` is the index of a source in the recipe. The sequence with index i starts at token i x sequence_length of
    the source. Raises InputError if a source with a positive weight is too small for one sequence.
    """
    found: NDArray[np.void] = sequences_for_steps(recipe, store, step, step + 1)[0]
    return found


def sequences_for_steps(recipe: Recipe, store: TokenStore, first_step: int, end_step: int) -> NDArray[np.void]:
    """Return the `sequences` of steps [first_step, end_step): [steps, batch_sequences]."""
    if first_step < 0:
        raise ValueError(f"step {first_step}: steps are counted from 0")
    names, mixtures = list(recipe.data.sources), mixture_schedule(recipe)
    length = recipe.train.sequence_length
    sizes = []
    for source, name in enumerate(names):
        split = store[f"{name}/train"]
        sizes.append(split.num_sequences(length))
        if not sizes[-1] and any(mixture.shares[source] for mixture in mixtures):
            raise InputError(
                f"{split.folder}: {split.num_tokens} tokens, too few for a sequence of {length} and its targets; "
                "add text or reduce train.sequence_length"
            )
    return compute_order(recipe.seed, names, sizes, mixtures, recipe.train.batch_sequences, first_step, end_step)


def mixture_schedule(recipe: Recipe) -> tuple[Mixture, ...]:
    """Return the recipe's mixtures in ascending order of their first steps; the first mixture begins at step 0.

    A ramp becomes a series of up to 64 mixtures.
    """
    sources = recipe.data.sources
    stages = tuple(
        (stage.from_tokens, stage.ramp_tokens, tuple(stage.weights.get(name, 0.0) for name in sources))
        for stage in recipe.data.stages
    )
    weights = tuple(source.weight for source in sources.values())
    return _cached_schedule(weights, stages, recipe.train.batch_tokens)


def num_validation_sequences(recipe: Recipe, available: Mapping[str, int]) -> dict[str, int]:
    """Return the number of validation sequences by source; `available` has the number in each validation split.

    The numbers are in proportion to the weights of the first mixture. Sources with the weight 0 there, and sources
    without a sequence in `available`, are not in the result.
    """
    weights = dict(zip(recipe.data.sources, mixture_schedule(recipe)[0].shares, strict=True))
    available = {name: available[name] for name, weight in weights.items() if weight and available.get(name)}
    total_weight = sum(weights[name] for name in available)
    shares = {name: float(weights[name] / total_weight) for name in available}
    total = min([recipe.train.validation_sequences, *(available[name] / shares[name] for name in available)])
    return {name: max(1, math.floor(total * share + 1e-9)) for name, share in shares.items()}


@lru_cache(maxsize=16)
def _cached_schedule(
    weights: tuple[float, ...], stages: tuple[tuple[int, int, tuple[float, ...]], ...], batch_tokens: int
) -> tuple[Mixture, ...]:
    schedule = [Mixture(0, _normalized(weights))]
    for from_tokens, ramp_tokens, weights_after in stages:
        before, after = schedule[-1].shares, _normalized(weights_after)
        first_step, end_step = -(-from_tokens // batch_tokens), -(-(from_tokens + ramp_tokens) // batch_tokens)
        schedule += _ramp(before, after, first_step, end_step)
        schedule.append(Mixture(end_step, after))
    # Of several mixtures with the same first step, the last one applies.
    return tuple({mixture.first_step: mixture for mixture in schedule}.values())


def _ramp(before: tuple[Fraction, ...], after: tuple[Fraction, ...], first_step: int, end_step: int) -> list[Mixture]:
    """Approximate a linear ramp by constant mixtures.

    Each mixture has the ramp's shares at the middle of the mixture's steps, so that each source contributes the same
    total as in a linear ramp.
    """
    count = min(_MAX_RAMP_STEPS, end_step - first_step)
    ramp = []
    for number in range(count):
        progress = Fraction(2 * number + 1, 2 * count)
        shares = tuple(old + (new - old) * progress for old, new in zip(before, after, strict=True))
        ramp.append(Mixture(first_step + number * (end_step - first_step) // count, shares))
    return ramp


def _normalized(weights: Sequence[float]) -> tuple[Fraction, ...]:
    exact = [Fraction(str(weight)) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)


def compute_order(
    seed: int,
    names: Sequence[str],
    sizes: Sequence[int],
    mixtures: Sequence[Mixture],
    batch: int,
    first_step: int,
    end_step: int,
) -> NDArray[np.void]:
    """Return the sequences of steps [first_step, end_step), in the form of `sequences_for_steps`: [steps, batch].

    `names` and `sizes` contain the name and the number of sequences of each source. `batch` is the batch size in
    sequences.
    """
    counts = _num_sequences_by_step(_grid(tuple(mixtures), batch), first_step, end_step)
    order = np.empty(counts.sum(), SEQUENCE_DTYPE)
    order["source"] = np.repeat(np.tile(np.arange(len(names)), len(counts)), counts.ravel())
    starts = sequences_consumed_before(mixtures, batch, first_step)
    for source, (start, count) in enumerate(zip(starts, counts.sum(axis=0).tolist(), strict=True)):
        if count:
            own = order["source"] == source
            order["epoch"][own] = np.arange(start, start + count) // sizes[source]
            order["index"][own] = _indices(seed, names[source], sizes[source], start, start + count)
    return order.reshape(len(counts), batch)


def _indices(seed: int, name: str, size: int, start: int, stop: int) -> NDArray[np.int64]:
    """Return the indices of the sequences at positions [start, stop) of a source's order, a permutation per epoch."""
    parts = []
    for epoch in range(start // size, -(-stop // size)):
        positions = np.arange(max(start, epoch * size), min(stop, (epoch + 1) * size)) - epoch * size
        parts.append(permute(positions, size, _permutation_key(seed, name, epoch)))
    return np.concatenate(parts)


def sequences_consumed_before(mixtures: Sequence[Mixture], batch: int, step: int) -> list[int]:
    """Return, for each source, the number of sequences that all steps before `step` read: [sources]."""
    grid = _grid(tuple(mixtures), batch)
    number = bisect_right(grid.first_steps, step) - 1
    own = _num_sequences_of_steps(grid.edges[number].tolist(), step - int(grid.first_steps[number]))
    return [before + count for before, count in zip(grid.consumed[number], own, strict=True)]


@lru_cache(maxsize=16)
def _grid(mixtures: tuple[Mixture, ...], batch: int) -> _Grid:
    first_steps = [mixture.first_step for mixture in mixtures]
    edges = [
        [round(batch * _GRID_POINTS * edge) for edge in accumulate(mixture.shares, initial=Fraction(0))]
        for mixture in mixtures
    ]
    consumed = [[0] * len(mixtures[0].shares)]
    for own_edges, (start, end) in zip(edges, pairwise(first_steps), strict=False):
        own = _num_sequences_of_steps(own_edges, end - start)
        consumed.append([before + count for before, count in zip(consumed[-1], own, strict=True)])
    return _Grid(np.array(first_steps), np.array(edges), tuple(consumed))


def _num_sequences_by_step(grid: _Grid, first_step: int, end_step: int) -> NDArray[np.int64]:
    """Return, for each step and source, the number of the source's sequences that the step reads: [steps, sources].

    In every step, each source has its exact share, rounded down or up. Over many steps, the mean approaches the exact
    share. The result for a step does not depend on the results for earlier steps.

    Let P = `_GRID_POINTS` and g = `_GOLDEN_OFFSET`. A batch of B sequences has B P grid points. Each source has an
    interval of these points, in proportion to its share. Step m of a mixture takes the B points o, o + P, o + 2 P, ...
    with o = m g mod P. For each point, the step reads one sequence of the source whose interval contains the point. Of
    the step's B points, floor((e - 1 - o) / P) + 1 lie below an edge e. The number of sequences of a source is the
    difference between the values of this term at the two edges of its interval. This number is the length of the
    interval divided by P, rounded down or up. Since g / P is the inverse of the golden ratio, the steps that round up
    are distributed evenly.
    """
    steps = np.arange(first_step, end_step)
    mixture = np.searchsorted(grid.first_steps, steps, "right") - 1
    offsets = (steps - grid.first_steps[mixture]) * _GOLDEN_OFFSET % _GRID_POINTS
    return np.diff((grid.edges[mixture] - 1 - offsets[:, None]) // _GRID_POINTS)


def _num_sequences_of_steps(edges: list[int], steps: int) -> list[int]:
    """Return, for each source, the number of sequences that the first `steps` steps of a mixture read: [sources].

    With the symbols of `_num_sequences_by_step`, floor((e - 1 - (m g mod P)) / P) is floor((e - 1 - m g) / P) plus
    floor(m g / P). The second term is the same for both edges of a source, so it cancels. The sum of the first term
    over the steps is a `_floor_sum`.
    """
    below = [_floor_sum(steps, _GRID_POINTS, -_GOLDEN_OFFSET, edge - 1) for edge in edges]
    return [high - low for low, high in pairwise(below)]


def _floor_sum(count: int, modulus: int, factor: int, offset: int) -> int:
    """Return the sum of floor((factor i + offset) / modulus) over i from 0 to count - 1, in O(log modulus).

    First, the multiples of the modulus in `factor` and `offset` are summed directly. The rest of the sum is the number
    of lattice points (i, j) with 0 <= i < count and 1 <= j <= (factor i + offset) / modulus. Let
    top = factor count + offset. Counted along the other axis, the number of these points is the sum of
    floor((modulus j + top mod modulus) / factor) over j from 0 to floor(top / modulus) - 1. This sum has the same form,
    with `modulus` and `factor` exchanged as in Euclid's algorithm. The sum is empty if top < modulus.
    (Graham, Knuth and Patashnik: Concrete Mathematics, section 3.5; `floor_sum` of the AtCoder Library.)
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


def permute(positions: NDArray[np.int64], size: int, key: Sequence[int]) -> NDArray[np.int64]:
    """Map positions in [0, size) to their values under the permutation that `key` selects.

    A balanced Feistel network (Luby and Rackoff 1988) permutes the numbers below the next power of four. The network is
    applied until the value is below `size` (cycle walking, Black and Rogaway 2002). On average, this takes at most four
    applications. `key` has one 64-bit number per round of the network.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = positions.astype(np.uint64)
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
    """Apply SplitMix64's finalizer (Steele, Lea and Flood 2014); products are computed modulo 2^64."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@lru_cache(maxsize=256)
def _permutation_key(seed: int, name: str, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{name}/{epoch}".encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))
