"""Curves keep every spike, every mean and every count, for any number of rows."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.plots.curves import MAX_BINS, downsample, min_max_envelope, running_mean, summarize_metrics


def rows_of(losses: Sequence[float | None]) -> list[dict[str, Any]]:
    return [{"step": step, "tokens": 10 * step, "loss": loss} for step, loss in enumerate(losses, 1)]


def test_few_rows_are_not_merged() -> None:
    curve = summarize_metrics(rows_of([5.0, None, 3.0, math.nan, 4.0])).curves["loss"]
    assert curve.tokens.tolist() == [10, 30, 50]
    assert curve.low.tolist() == curve.mean.tolist() == curve.high.tolist() == [5, 3, 4]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60_000), st.integers(1, 5000), st.data())
def test_merging_keeps_extremes_means_and_counts(count: int, max_bins: int, data: st.DataObject) -> None:
    losses: list[float | None] = [2.0 + (step % 7) / 10 for step in range(count)]
    spike = data.draw(st.integers(0, count - 1))
    losses[spike] = 9.0
    curve = summarize_metrics(rows_of(losses)).curves["loss"]
    thin = downsample(curve, max_bins)
    assert len(curve) <= MAX_BINS
    assert len(thin) <= max_bins
    for found in (curve, thin):
        assert found.count.sum() == count
        assert np.isclose((found.mean * found.count).sum(), sum(loss or 0 for loss in losses))
        assert np.isclose((found.tokens * found.count).sum(), sum(10 * step for step in range(1, count + 1)))
        assert found.high.max() == 9.0
        place = int(found.high.argmax())
        assert abs(found.tokens[place] - 10 * (spike + 1)) <= 10 * found.count[place]
        assert set(min_max_envelope(found)[1]) <= set(losses)


def test_running_mean_has_no_lag_at_start_and_no_noise_at_end() -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, 2000)
    curve = summarize_metrics(rows_of([*(10.0 - step for step in range(5)), *(5 + noise).tolist()])).curves["loss"]
    means = running_mean(curve)
    assert means[0] == 10.0
    assert np.abs(means[100:] - 5).max() < 0.1


def test_sparse_metric_keeps_its_tokens() -> None:
    rows = rows_of([3.0] * 100_000)
    for step in (1000, 50_000, 100_000):
        rows[step - 1]["validation_loss"] = step / 1000
    curve = summarize_metrics(rows).curves["validation_loss"]
    assert curve.tokens.tolist() == [10_000, 500_000, 1_000_000]
    assert curve.mean.tolist() == [1, 50, 100]


@pytest.mark.parametrize("first", [3, 5000, 100_000], ids=["first chunk", "later chunk", "after merging"])
def test_columns_of_sources_that_begin_late_become_curves(first: int) -> None:
    rows = rows_of([3.0] * 120_000)
    for step in range(first, 120_001, 1000):
        rows[step - 1] |= {"validation_loss": 2.0, "validation_loss/a": 2.5, "validation_bits_per_byte/a": step / 1000}
    rows[0] |= {"validation_loss": 2.0}  # a run of an earlier version
    found = summarize_metrics(rows)
    assert found.sources == ["a"]
    curve = found.curves["validation_bits_per_byte/a"]
    assert (curve.mean * curve.count).sum() == pytest.approx(sum(range(first, 120_001, 1000)) / 1000)
    assert (curve.tokens[0], curve.low[0]) == (10 * first, first / 1000)
    assert found.newest["validation_loss/a"][1] == 2.5
    assert len(found.curves["loss"]) <= MAX_BINS and found.curves["loss"].count.sum() == 120_000


def test_newest_values_duration_and_skips() -> None:
    rows = rows_of([3.0] * 9998 + [2.5, None])
    for row in rows:
        row["tokens_per_second"] = 20.0
    rows[99]["skipped"] = rows[9999]["skipped"] = "loss nan"
    found = summarize_metrics(rows)
    assert (found.step, found.tokens, found.num_skipped) == (10_000, 100_000, 2)
    assert found.newest["loss"] == (9999, 2.5)
    assert found.seconds == pytest.approx(10_000 * 10 / 20)
    assert "validation_loss" not in found.newest


def test_no_rows_have_empty_curves() -> None:
    found = summarize_metrics([])
    assert (found.step, found.tokens, len(found.curves["loss"])) == (0, 0, 0)
