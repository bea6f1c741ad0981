"""Curves of a run's metrics against tokens, whose size in memory does not grow with the length of the run.

Each row is read once. Adjacent rows are merged into at most 4,096 bins. Each bin has a minimum, maximum and mean, so a
spike of one step in a million stays visible.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

METRICS = (
    "loss",
    "validation_loss",
    "validation_bits_per_byte",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "mfu",
    "memory_bytes",
)
"""Columns of metrics.jsonl that become curves, in addition to the parts of a validation; see `metric_names`."""
_BY_SOURCE, _BY_POSITION = "validation_bits_per_byte/", "validation_bits_per_byte_by_position/"
_PARTS = ("validation_loss/", "validation_loss_by_position/", _BY_SOURCE, _BY_POSITION)
"""Beginnings of the names of metrics of single sources and of ranges of positions."""
MAX_BINS = 4096
_CHUNK_ROWS = 4096
_SMOOTHING_FRACTION = 0.02
"""Width of the running mean's window, as a fraction of the curve."""

Floats = NDArray[np.float64]


def metric_names(row: Mapping[str, Any]) -> Iterable[str]:
    """Return METRICS and the row's columns of sources and positions, such as `validation_loss/slimpajama`."""
    validation = row if "validation_loss" in row else ()
    return (*METRICS, *(name for name in validation if name.startswith(_PARTS)))


# Bins are an array [5, bins] or [5, bins, metrics]. The first axis has minimum, maximum, sum of values, sum of tokens
# and number of rows. If a metric has no value in a bin, these are inf, -inf, 0, 0 and 0.
_MERGES = (np.minimum, np.maximum, np.add, np.add, np.add)


def _merge(bins: Floats, size: int) -> Floats:
    """Merge groups of `size` adjacent bins into one bin each; the last group may be smaller."""
    starts = np.arange(0, bins.shape[1], size)
    return np.stack([merge.reduceat(part, starts, axis=0) for merge, part in zip(_MERGES, bins, strict=True)])


@dataclass(frozen=True)
class Curve:
    """A metric over tokens, as float64 arrays with one entry per non-empty bin."""

    tokens: Floats
    """Number of tokens seen, averaged over the rows of each bin."""
    low: Floats
    high: Floats
    mean: Floats
    count: Floats
    """Number of rows per bin."""

    def __len__(self) -> int:
        return len(self.tokens)


def _curve(bins: Floats) -> Curve:
    low, high, total, tokens, count = bins
    return Curve(tokens / count, low, high, total / count, count)


@dataclass(frozen=True)
class MetricsSummary:
    """Curves and totals of a run's metrics."""

    curves: Mapping[str, Curve]
    """Curve of each metric in METRICS and of each part of the validations, by name."""
    newest: Mapping[str, tuple[int, float]]
    """By metric: step and value of the newest row that has the metric."""
    step: int
    """Step of the newest row; 0 without rows."""
    tokens: int
    """Number of tokens seen at the newest row."""
    seconds: float
    """Total duration of the steps in seconds, without validation, checkpoints and interruptions."""
    num_skipped: int
    """Number of skipped steps."""

    @property
    def sources(self) -> list[str]:
        """Sources with a validation result of their own."""
        return self._parts(_BY_SOURCE)

    @property
    def positions(self) -> list[str]:
        """Ranges of positions with a validation result of their own, such as `0-255`."""
        return self._parts(_BY_POSITION)

    def _parts(self, beginning: str) -> list[str]:
        return [name.removeprefix(beginning) for name in self.newest if name.startswith(beginning)]


class MetricsAccumulator:
    """Summary of rows of metrics.jsonl that grows with each call of `add`, in bounded memory."""

    def __init__(self) -> None:
        self.names = list(METRICS)
        """Metrics, in the order of the last axis of the bins. Parts of a validation are added when a row has them."""
        self.bins = self.pending = np.zeros((5, 0, len(METRICS)))
        """Complete bins, and the newest rows, which do not fill a bin."""
        self.rows_per_bin = 1
        self.newest: dict[str, tuple[int, float]] = {}
        self.last: Mapping[str, Any] = {}
        self.seconds, self.num_skipped = 0.0, 0

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of metrics.jsonl; each row has `tokens` and may have `step` and metrics."""
        remaining = iter(rows)
        while chunk := list(islice(remaining, _CHUNK_ROWS)):
            self.last = chunk[-1]
            validated = (row for row in chunk if "validation_loss" in row)
            if new := dict.fromkeys(name for row in validated for name in metric_names(row) if name not in self.names):
                self._add_names(new)
            values = np.array([[row.get(name) for name in self.names] for row in chunk], dtype=np.float64)
            tokens = np.array([row["tokens"] for row in chunk], dtype=np.float64)
            steps = np.array([row.get("step", 0) for row in chunk])
            valid = np.isfinite(values)
            for column, name in enumerate(self.names):
                if valid[:, column].any():
                    row = np.flatnonzero(valid[:, column])[-1]
                    self.newest[name] = (int(steps[row]), float(values[row, column]))
            self.seconds += _step_seconds(steps, tokens, values[:, self.names.index("tokens_per_second")])
            self.num_skipped += sum("skipped" in row for row in chunk)
            low, high = np.where(valid, values, np.inf), np.where(valid, values, -np.inf)
            new_bins = np.stack([low, high, np.where(valid, values, 0.0), valid * tokens[:, None], valid])
            self._add_bins(np.concatenate([self.pending, new_bins], axis=1))

    def _add_names(self, names: Collection[str]) -> None:
        """Add metrics, which have no value in the bins so far."""
        self.names += names
        empty = np.array([np.inf, -np.inf, 0, 0, 0])[:, None, None]
        self.bins, self.pending = (
            np.concatenate([bins, np.tile(empty, (1, bins.shape[1], len(names)))], axis=2)
            for bins in (self.bins, self.pending)
        )

    def _add_bins(self, rows: Floats) -> None:
        complete = rows.shape[1] // self.rows_per_bin * self.rows_per_bin
        self.pending = rows[:, complete:]
        if complete:
            self.bins = np.concatenate([self.bins, _merge(rows[:, :complete], self.rows_per_bin)], axis=1)
        while self.bins.shape[1] > MAX_BINS:
            self.bins, self.rows_per_bin = _merge(self.bins, 2), 2 * self.rows_per_bin

    def summary(self) -> MetricsSummary:
        """Return the curves and totals of all rows so far."""
        bins = self.bins
        if self.pending.shape[1]:
            bins = np.concatenate([bins, _merge(self.pending, self.rows_per_bin)], axis=1)
            bins = _merge(bins, 2) if bins.shape[1] > MAX_BINS else bins
        curves = {name: _curve(bins[:, bins[4, :, column] > 0, column]) for column, name in enumerate(self.names)}
        step, tokens = self.last.get("step", 0), self.last.get("tokens", 0)
        return MetricsSummary(curves, dict(self.newest), step, tokens, self.seconds, self.num_skipped)


def summarize_metrics(rows: Iterable[Mapping[str, Any]]) -> MetricsSummary:
    """Summarize rows of metrics.jsonl; see `MetricsAccumulator.add`."""
    accumulator = MetricsAccumulator()
    accumulator.add(rows)
    return accumulator.summary()


def _step_seconds(steps: NDArray[np.int64], tokens: Floats, speeds: Floats) -> float:
    """Return the total duration of the steps in seconds.

    The duration of a step is the tokens per step (`tokens` divided by `step`), divided by the tokens per second.
    """
    known = (speeds > 0) & (steps > 0)
    return float(np.sum(tokens[known] / steps[known] / speeds[known]))


def downsample(curve: Curve, max_bins: int) -> Curve:
    """Merge adjacent bins of a curve, so that at most `max_bins` remain."""
    size = math.ceil(len(curve) / max_bins)
    if size <= 1:
        return curve
    totals = (curve.mean * curve.count, curve.tokens * curve.count, curve.count)
    return _curve(_merge(np.stack([curve.low, curve.high, *totals]), size))


def min_max_envelope(curve: Curve) -> tuple[Floats, Floats]:
    """Return the tokens and values of a line through the minimum and the maximum of each bin."""
    return np.repeat(curve.tokens, 2), np.column_stack([curve.low, curve.high]).reshape(-1)


def running_mean(curve: Curve) -> Floats:
    """Return, for each bin, the mean over a window of bins around the bin.

    Near the start, where curves are steep, both sides of the window are shortened, so that the mean does not lag. Near
    the end, only the right side is shortened, so that the mean does not become noisy.
    """
    place = np.arange(len(curve))
    before = np.minimum(max(1, round(len(curve) * _SMOOTHING_FRACTION / 2)), place)
    after = np.minimum(before, place[::-1])
    totals, counts = (np.concatenate(([0.0], np.cumsum(column))) for column in (curve.mean * curve.count, curve.count))
    first, last = place - before, place + after + 1
    means: Floats = (totals[last] - totals[first]) / (counts[last] - counts[first])
    return means
