"""A run's metrics as curves: what the pictures draw, in memory that does not grow with the run.

Reads metrics.jsonl, one pass. Every row counts: while they are read, neighbouring rows are joined to at most 4,096
spans that keep their least, greatest and mean values, so that a spike of one step in a million still shows.
"""

import math
from collections.abc import Callable, Iterable, Mapping
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
"""The columns of metrics.jsonl that are curves."""

MOST_SPANS = 4096
_ROWS_AT_ONCE = 4096
_SMOOTHED_SHARE = 0.02  # of the curve; about what the eye would average by itself

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A metric against tokens seen, float64 [spans] each; a span without a value is left out."""

    tokens: Floats
    """Mean of the span's rows that have a value."""
    low: Floats
    high: Floats
    mean: Floats
    count: Floats
    """Rows with a value."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Metrics:
    """What the rows of a run say."""

    curves: Mapping[str, Curve]
    """By their names in METRICS."""
    newest: Mapping[str, tuple[int, float]]
    """Name -> step and value of the newest row that has one."""
    step: int
    """Of the newest row; 0 without rows."""
    tokens: int
    seconds: float
    """That the steps took; validation, saving and standstill not counted."""
    num_skipped: int


@dataclass(frozen=True)
class _Bins:
    """Neighbouring rows joined: float64 [spans, metrics] each. What has no value is +inf, -inf, 0, 0, 0."""

    low: Floats
    high: Floats
    total: Floats
    tokens: Floats
    count: Floats

    def joined(self, by: int) -> "_Bins":
        """Each `by` neighbours as one; the last may be of fewer."""
        starts = np.arange(0, len(self.low), by)
        return self.each(_REDUCTIONS, lambda column, reduction: reduction.reduceat(column, starts, axis=0))

    def followed_by(self, other: "_Bins") -> "_Bins":
        """These, then the others."""
        return self.each(other.columns(), lambda column, more: np.concatenate([column, more]))

    def columns(self) -> tuple[Floats, ...]:
        """All five."""
        return (self.low, self.high, self.total, self.tokens, self.count)

    def each(self, others: Iterable[Any], join: Callable[[Floats, Any], Floats]) -> "_Bins":
        """A function of each column and what goes with it."""
        return _Bins(*(join(column, other) for column, other in zip(self.columns(), others, strict=True)))


_REDUCTIONS = (np.minimum, np.maximum, np.add, np.add, np.add)


def summarize_metrics(rows: Iterable[Mapping[str, Any]]) -> Metrics:
    """Go through rows of metrics.jsonl once. A row has `tokens`, and `step` and the metrics where there are any."""
    left, spans, rows_a_span = iter(rows), None, 1
    newest: dict[str, tuple[int, float]] = {}
    last: Mapping[str, Any] = {}
    seconds, num_skipped = 0.0, 0
    while chunk := list(islice(left, max(_ROWS_AT_ONCE, rows_a_span))):
        last = chunk[-1]
        found = np.array([[row.get(name) for name in METRICS] for row in chunk], dtype=np.float64)
        tokens = np.array([row["tokens"] for row in chunk], dtype=np.float64)
        newest |= _newest(chunk, found)
        seconds += _seconds(chunk, tokens)
        num_skipped += sum("skipped" in row for row in chunk)
        more = _spans(tokens, found).joined(rows_a_span)
        spans = spans.followed_by(more) if spans else more
        while len(spans.low) > MOST_SPANS:
            spans, rows_a_span = spans.joined(2), 2 * rows_a_span
    curves = {name: _curve(spans, place) for place, name in enumerate(METRICS)}
    return Metrics(curves, newest, last.get("step", 0), last.get("tokens", 0), seconds, num_skipped)


def _spans(tokens: Floats, found: Floats) -> _Bins:
    """A span a row, of tokens [rows] and values [rows, metrics]."""
    has = np.isfinite(found)
    values = np.where(has, found, 0.0)
    low, high = np.where(has, found, np.inf), np.where(has, found, -np.inf)
    return _Bins(low, high, values, has * tokens[:, None], has.astype(np.float64))


def _newest(chunk: list[Mapping[str, Any]], found: Floats) -> dict[str, tuple[int, float]]:
    newest = {}
    for place, name in enumerate(METRICS):
        has = np.flatnonzero(np.isfinite(found[:, place]))
        if len(has):
            newest[name] = (chunk[has[-1]].get("step", 0), float(found[has[-1], place]))
    return newest


def _seconds(chunk: list[Mapping[str, Any]], tokens: Floats) -> float:
    """A step's tokens are all of its row's, divided by its number."""
    pairs = [(row.get("step"), row.get("tokens_per_second")) for row in chunk]
    steps, speeds = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    known = (speeds > 0) & (steps > 0)
    return float(np.sum(tokens[known] / steps[known] / speeds[known]))


def _curve(spans: _Bins | None, place: int) -> Curve:
    if spans is None:
        return Curve(*(np.zeros(0) for _ in range(5)))
    has = spans.count[:, place] > 0
    low, high, total, tokens, count = (column[has, place] for column in spans.columns())
    return Curve(tokens / count, low, high, total / count, count)


def downsample(curve: Curve, most: int) -> Curve:
    """The curve with at most so many spans, neighbours joined."""
    by = math.ceil(len(curve) / most)
    if by <= 1:
        return curve
    starts = np.arange(0, len(curve), by)
    count = np.add.reduceat(curve.count, starts)
    tokens, mean = (np.add.reduceat(column * curve.count, starts) / count for column in (curve.tokens, curve.mean))
    return Curve(tokens, np.minimum.reduceat(curve.low, starts), np.maximum.reduceat(curve.high, starts), mean, count)


def min_max_envelope(curve: Curve) -> tuple[Floats, Floats]:
    """Tokens and values of the line through the least and the greatest value of each span."""
    return np.repeat(curve.tokens, 2), np.column_stack([curve.low, curve.high]).reshape(-1)


def smoothed(curve: Curve) -> Floats:
    """The running mean over a window around each span.

    It narrows at the steep beginning, not to lag behind; at the end it loses its right side only, not to end in noise.
    """
    place = np.arange(len(curve))
    before = np.minimum(max(1, round(len(curve) * _SMOOTHED_SHARE / 2)), place)
    after = np.minimum(before, place[::-1])
    totals, counts = (np.concatenate(([0.0], np.cumsum(column))) for column in (curve.mean * curve.count, curve.count))
    first, last = place - before, place + after + 1
    means: Floats = (totals[last] - totals[first]) / (counts[last] - counts[first])
    return means
