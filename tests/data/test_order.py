"""The order of the data is a pure function that reads every sequence once an epoch, in an exact mix."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.data.order import Mix, _floor_sum, permute, rows_before, rows_of_step

WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=5)


def mix_of(weights: list[int], first_step: int = 0) -> Mix:
    return Mix(first_step, tuple(Fraction(weight, sum(weights)) for weight in weights))


def steps_of(sizes: list[int], mixes: list[Mix], batch: int, steps: int) -> list[np.ndarray]:
    names = [f"source{k}" for k in range(len(sizes))]
    return [rows_of_step(1337, names, sizes, mixes, batch, step) for step in range(steps)]


@given(size=st.integers(1, 5000), key=st.lists(st.integers(0, 2**64 - 1), min_size=8, max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_permutation_hits_every_place_once(size: int, key: list[int]) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    batch=st.integers(1, 16),
    steps=st.integers(1, 60),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_sequence_is_read_once_in_an_epoch(sizes: list[int], batch: int, steps: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    rows = np.concatenate(steps_of(sizes, [mix_of(weights)], batch, steps))
    for source, size in enumerate(sizes):
        own = rows[rows["source"] == source]
        for epoch in np.unique(own["epoch"]):
            read = own["index"][own["epoch"] == epoch]
            assert len(np.unique(read)) == len(read)
            assert np.array_equal(np.sort(read), np.arange(size)) or epoch == own["epoch"].max()


@given(weights=WEIGHTS, batch=st.integers(1, 64), step=st.integers(0, 2_000_000))
@settings(max_examples=200, deadline=None)
def test_the_mix_is_exact_in_every_batch_to_within_one_row(weights: list[int], batch: int, step: int) -> None:
    mixes = [mix_of(weights)]
    counts = np.subtract(rows_before(mixes, batch, step + 1), rows_before(mixes, batch, step))
    assert counts.sum() == batch
    for count, share in zip(counts, mixes[0].shares, strict=True):
        assert abs(count - batch * share) < 1 + 1e-6


@given(weights=WEIGHTS, batch=st.integers(1, 64), step=st.integers(0, 2_000_000))
@settings(max_examples=100, deadline=None)
def test_the_mix_never_drifts(weights: list[int], batch: int, step: int) -> None:
    mixes = [mix_of(weights)]
    for given_rows, share in zip(rows_before(mixes, batch, step), mixes[0].shares, strict=True):
        assert abs(given_rows - batch * step * share) < 16


def test_a_step_needs_nothing_but_its_arguments() -> None:
    sizes, mixes = [500_000_000, 200_000_000], [mix_of([7, 3])]
    forward = steps_of(sizes, mixes, 32, 5)
    again = [rows_of_step(1337, ["source0", "source1"], sizes, mixes, 32, step) for step in (4, 0, 3, 1, 2)]
    for step, rows in zip((4, 0, 3, 1, 2), again, strict=True):
        assert np.array_equal(rows, forward[step])


def test_seed_source_and_epoch_each_change_the_order() -> None:
    mixes, place = [mix_of([1])], np.arange(64)
    first, second = (rows_of_step(1, ["a"], [64], mixes, 64, step)["index"] for step in (0, 1))
    other_seed = rows_of_step(2, ["a"], [64], mixes, 64, 0)["index"]
    other_name = rows_of_step(1, ["b"], [64], mixes, 64, 0)["index"]
    orders = {tuple(order) for order in (place, first, second, other_seed, other_name)}
    assert len(orders) == 5


def test_a_stage_changes_the_mix_at_its_step_and_loses_no_sequence() -> None:
    mixes = [mix_of([1, 1]), Mix(10, (Fraction(0), Fraction(1))), Mix(20, (Fraction(1, 4), Fraction(3, 4)))]
    rows = steps_of([1000, 1000], mixes, 8, 30)
    shares = [float((part["source"] == 0).mean()) for part in rows]
    assert shares[:10] == [0.5] * 10
    assert shares[10:20] == [0.0] * 10
    assert shares[20:] == [0.25] * 10
    own = np.concatenate(rows)
    for source in (0, 1):
        read = own["index"][own["source"] == source]
        assert len(np.unique(read)) == len(read)


def test_the_order_is_the_one_that_was_fixed() -> None:
    # A run must be able to go on under any later version: these rows may never change.
    rows = rows_of_step(1337, ["slimpajama", "starcoderdata"], [1000, 400], [mix_of([7, 3])], 10, 123)
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


@given(st.integers(0, 40), st.integers(1, 60), st.integers(-99, 99), st.integers(-99, 99))
def test_the_closed_form_is_the_sum(count: int, modulus: int, factor: int, offset: int) -> None:
    expected = sum((factor * i + offset) // modulus for i in range(count))
    assert _floor_sum(count, modulus, factor, offset) == expected


@pytest.mark.parametrize("module", ["recipe", "plan", "data.order", "train.schedule", "data.store"])
def test_the_pure_modules_import_no_torch(module: str) -> None:
    code = f"import sys, tinyllama.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
