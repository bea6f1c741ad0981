"""The data order: a pure function that reads every sequence once per epoch, with exact shares."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.data.order import (
    Mixture,
    _floor_sum,
    _permutation_key,
    compute_order,
    mixture_schedule,
    permute,
    sequences_consumed_before,
)
from tinyllama.errors import InputError
from tinyllama.recipe import Recipe

WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=5)


def mixture_of(weights: list[int], first_step: int = 0) -> Mixture:
    return Mixture(first_step, tuple(Fraction(weight, sum(weights)) for weight in weights))


def orders_of_steps(sizes: list[int], mixtures: Sequence[Mixture], batch: int, steps: int) -> list[np.ndarray]:
    names = [f"source{k}" for k in range(len(sizes))]
    return list(compute_order(1337, names, sizes, mixtures, batch, 0, steps))


def order_of_step(
    seed: int, names: list[str], sizes: list[int], mixtures: Sequence[Mixture], batch: int, step: int
) -> np.ndarray:
    rows: np.ndarray = compute_order(seed, names, sizes, mixtures, batch, step, step + 1)[0]
    return rows


@given(size=st.integers(1, 5000), key=st.lists(st.integers(0, 2**64 - 1), min_size=8, max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_permutation_reaches_every_position_once(size: int, key: list[int]) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    batch=st.integers(1, 16),
    steps=st.integers(1, 60),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_sequence_is_read_once_per_epoch(sizes: list[int], batch: int, steps: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    rows = np.concatenate(orders_of_steps(sizes, [mixture_of(weights)], batch, steps))
    for source, size in enumerate(sizes):
        own = rows[rows["source"] == source]
        for epoch in np.unique(own["epoch"]):
            read = own["index"][own["epoch"] == epoch]
            assert len(np.unique(read)) == len(read)
            assert np.array_equal(np.sort(read), np.arange(size)) or epoch == own["epoch"].max()


@given(weights=WEIGHTS, batch=st.integers(1, 64), step=st.integers(0, 2_000_000))
@settings(max_examples=200, deadline=None)
def test_shares_are_exact_in_every_batch_to_within_one_sequence(weights: list[int], batch: int, step: int) -> None:
    mixtures = [mixture_of(weights)]
    counts = np.subtract(
        sequences_consumed_before(mixtures, batch, step + 1), sequences_consumed_before(mixtures, batch, step)
    )
    assert counts.sum() == batch
    for count, share in zip(counts, mixtures[0].shares, strict=True):
        assert abs(count - batch * share) < 1 + 1e-6


@given(weights=WEIGHTS, batch=st.integers(1, 64), step=st.integers(0, 2_000_000))
@settings(max_examples=100, deadline=None)
def test_shares_never_drift(weights: list[int], batch: int, step: int) -> None:
    mixtures = [mixture_of(weights)]
    for consumed, share in zip(sequences_consumed_before(mixtures, batch, step), mixtures[0].shares, strict=True):
        assert abs(consumed - batch * step * share) < 16


def test_seed_source_and_epoch_change_the_order() -> None:
    mixtures, place = [mixture_of([1])], np.arange(64)
    first, second = (order_of_step(1, ["a"], [64], mixtures, 64, step)["index"] for step in (0, 1))
    other_seed = order_of_step(2, ["a"], [64], mixtures, 64, 0)["index"]
    other_name = order_of_step(1, ["b"], [64], mixtures, 64, 0)["index"]
    orders = {tuple(order) for order in (place, first, second, other_seed, other_name)}
    assert len(orders) == 5


def test_the_order_is_fixed() -> None:
    # Later versions must be able to resume a run, so these sequences never change.
    rows = order_of_step(1337, ["slimpajama", "starcoderdata"], [1000, 400], [mixture_of([7, 3])], 10, 123)
    assert rows.tolist() == [
        (0, 0, 823),
        (0, 0, 100),
        (0, 0, 736),
        (0, 0, 424),
        (0, 0, 619),
        (0, 0, 641),
        (0, 0, 554),
        (1, 0, 318),
        (1, 0, 283),
        (1, 0, 333),
    ]


def test_the_order_across_stages_and_epochs_is_fixed() -> None:
    stages = [mixture_of([7, 3, 0]), mixture_of([2, 1, 1], 5), mixture_of([0, 1, 4], 9)]
    fixed = {
        4: [(0, 0, 11), (0, 0, 5), (0, 0, 4), (0, 1, 4), (1, 0, 24), (1, 0, 37)],
        5: [(0, 1, 12), (0, 1, 8), (0, 1, 16), (1, 0, 49), (1, 0, 26), (2, 0, 0)],
        8: [(0, 1, 15), (0, 1, 10), (0, 1, 5), (1, 0, 21), (2, 1, 2), (2, 1, 0)],
        9: [(1, 0, 46), (1, 0, 36), (2, 2, 1), (2, 2, 2), (2, 2, 0), (2, 3, 0)],
        1_000_000: [(1, 24000, 25), *((2, 1599987, k) for k in (2, 1, 0)), (2, 1599988, 0), (2, 1599988, 2)],
    }
    for step, rows in fixed.items():
        assert order_of_step(7, ["web", "code", "notes"], [20, 50, 3], stages, 6, step).tolist() == rows
    sizes = [327_148_437, 128_173_828]  # a trillion tokens
    late = order_of_step(1337, ["slimpajama", "starcoderdata"], sizes, [mixture_of([7, 3])], 1024, 1_430_000)
    digest = hashlib.sha256(late.tobytes()).hexdigest()
    assert digest == "6fcab860182e2a3025808ca8809a1c7e58c48da9a8f2579b5efa378ec9d22122"


@given(sizes=st.lists(st.integers(1, 40), min_size=3, max_size=3), batch=st.integers(1, 16), first=st.integers(0, 30))
@settings(max_examples=25, deadline=None)
def test_steps_computed_together_equal_single_steps(sizes: list[int], batch: int, first: int) -> None:
    names = ["a", "b", "c"]
    stages = [mixture_of([7, 3, 0]), mixture_of([1, 1, 2], 8), mixture_of([0, 1, 4], 9), mixture_of([5, 0, 1], 21)]
    together = compute_order(7, names, sizes, stages, batch, first, first + 25)
    for step, rows in enumerate(together, first):
        plain = []
        spans = zip(
            sequences_consumed_before(stages, batch, step),
            sequences_consumed_before(stages, batch, step + 1),
            strict=True,
        )
        for source, (start, end) in enumerate(spans):
            for position in range(start, end):
                epoch, place = divmod(position, sizes[source])
                index = permute(np.array([place]), sizes[source], _permutation_key(7, names[source], epoch))[0]
                plain.append((source, epoch, index))
        assert rows.tolist() == plain


def v1_1(**overrides: object) -> Recipe:
    """Return the schedule of TinyLlama v1.1: web text, then code ramped in over 6B tokens, then a cool-down."""
    stages = [
        {"from_tokens": "1.5T", "ramp_tokens": "6B", "weights": {"slimpajama": 0.75, "starcoderdata": 0.25}},
        {"from_tokens": "1.85T", "weights": {"slimpajama": 0.6, "starcoderdata": 0.4}},
    ]
    sources = {"data.sources.slimpajama.weight": 1, "data.sources.starcoderdata.weight": 0}
    return Recipe.load("tinyllama-1.1b", {"train.tokens": "2T", "data.stages": stages, **sources, **overrides})


def test_a_ramp_is_linear_in_equal_steps() -> None:
    recipe = v1_1()
    first, last = (-(-tokens // recipe.train.batch_tokens) for tokens in (1_500_000_000_000, 1_506_000_000_000))
    found = mixture_schedule(recipe)
    assert [found[number].first_step for number in (0, 1, 65, 66)] == [0, first, last, 882149]
    assert found[65].shares == (Fraction(3, 4), Fraction(1, 4))
    spans = [(mixture.first_step, after.first_step) for mixture, after in pairwise(found[1:66])]
    assert {end - start for start, end in spans} == {(last - first) // 64, (last - first) // 64 + 1}
    for mixture, (start, end) in zip(found[1:65], spans, strict=True):
        line = Fraction(1, 4) * (Fraction(start + end, 2) - first) / (last - first)  # at the middle of the mixture
        assert sum(mixture.shares) == 1
        assert abs(mixture.shares[1] - line) < Fraction(1, 4 * (last - first))


def test_shares_are_exact_in_every_batch_of_a_ramp() -> None:
    recipe = v1_1()
    batch, found = recipe.train.batch_sequences, mixture_schedule(recipe)
    for mixture, after in pairwise(found):
        ends = after.first_step - 1, after.first_step
        for step in {mixture.first_step, mixture.first_step + 1, mixture.first_step + 2, ends[0] - 1, *ends}:
            shares = (mixture if step < after.first_step else after).shares
            counts = np.subtract(
                sequences_consumed_before(found, batch, step + 1), sequences_consumed_before(found, batch, step)
            )
            assert counts.sum() == batch
            for count, share in zip(counts.tolist(), shares, strict=True):
                assert abs(count - batch * share) < 1 + 1e-6


def test_a_ramp_neither_loses_nor_repeats_sequences() -> None:
    stage = {"from_tokens": 30 * 8 * 64, "ramp_tokens": 100 * 8 * 64, "weights": {"starcoderdata": 1}}
    small = {"train.batch_sequences": 8, "train.sequence_length": 64, "data.stages": [stage]}
    rows = np.concatenate(orders_of_steps([200, 90], mixture_schedule(v1_1(**small)), 8, 160))
    for source, size in enumerate((200, 90)):
        own = rows[rows["source"] == source]
        assert np.array_equal(own["epoch"], np.arange(len(own)) // size)
        for epoch in range(own["epoch"].max()):
            assert np.array_equal(np.sort(own["index"][own["epoch"] == epoch]), np.arange(size))
        last = own["index"][own["epoch"] == own["epoch"].max()]
        assert len(np.unique(last)) == len(last)
    assert (rows["source"][-240:] == 1).all()


def test_a_short_ramp_has_one_mixture_per_step() -> None:
    stage = {"from_tokens": 0, "ramp_tokens": 3 * 8 * 64, "weights": {"starcoderdata": 1}}
    found = mixture_schedule(v1_1(**{"train.batch_sequences": 8, "train.sequence_length": 64, "data.stages": [stage]}))
    assert [(mixture.first_step, mixture.shares[1]) for mixture in found] == [
        (0, Fraction(1, 6)),
        (1, Fraction(1, 2)),
        (2, Fraction(5, 6)),
        (3, 1),
    ]


@pytest.mark.parametrize("begin", ["1.5000001T", "1.5059T"])
def test_a_stage_that_begins_during_a_ramp_is_refused(begin: str) -> None:
    weights = {"slimpajama": 1}
    stages = [
        {"from_tokens": "1.5T", "ramp_tokens": "6B", "weights": weights},
        {"from_tokens": begin, "weights": weights},
    ]
    with pytest.raises(InputError, match=r"data: the stage from .*ramp_tokens"):
        v1_1(**{"data.stages": stages})
    stages[1]["from_tokens"] = "1.506T"
    assert mixture_schedule(v1_1(**{"data.stages": stages}))


@given(st.integers(0, 40), st.integers(1, 60), st.integers(-99, 99), st.integers(-99, 99))
def test_floor_sum_equals_the_direct_sum(count: int, modulus: int, factor: int, offset: int) -> None:
    expected = sum((factor * i + offset) // modulus for i in range(count))
    assert _floor_sum(count, modulus, factor, offset) == expected


def test_the_pure_modules_import_no_torch() -> None:
    modules = ("recipe", "plan.show", "data.order", "data.store", "runs.listing", "runs.log", "report.live")
    program = Path(__file__).with_name("import_program.py")
    names = [f"tinyllama.{module}" for module in (*modules, "tracking.trackers")]
    subprocess.run([sys.executable, str(program), *names], check=True)
