"""Charts of a report: series, marks and axes, as geometry in CSS pixels that page.html draws as SVG.

Each chart is drawn twice, with a linear and with a logarithmic vertical axis. A check box of the page selects one of
them, so the page needs no script. The script page.js shows the values of `Chart.values` under the pointer.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from tinyllama.formatting import format_bytes, format_count
from tinyllama.plots.charts import MAX_MARKERS, far_labels, readable_range
from tinyllama.plots.curves import Curve, Floats, downsample, min_max_envelope, running_mean
from tinyllama.report.marks import CATEGORIES, Mark, marks_of
from tinyllama.runs.log import Category, Event, event_category

_FORMATS: dict[str, Callable[[float], str]] = {
    "percent": lambda value: f"{100 * value:.3g} %",
    "bytes": lambda value: format_bytes(value) if value else "0",
    "count": format_count,
    "number": lambda value: f"{value:.6g}",
}
_TRACK, _ARROW, _CHARACTER = 27, 16, 7.0
"""Height of a track of marks, height of the label of a baseline outside the axis, and width of a character."""

Kind = Literal["smooth", "line", "points", "errors"]


@dataclass(frozen=True)
class Unit:
    """Unit of a chart's values."""

    label: str
    format: Literal["number", "percent", "count", "bytes"] = "number"

    @property
    def starts_at_zero(self) -> bool:
        """Whether the linear axis begins at zero, if no value is negative."""
        return self.format != "number"


@dataclass(frozen=True)
class Series:
    """One metric of one run.

    `kind` is `smooth` for a running mean with the range of the values, `line` for the values with their range, `points`
    for values that are measured only at some steps, and `errors` for points with error bars from `low` to `high`.
    """

    label: str
    color: str
    """CSS classes of the colour and the line."""
    curve: Curve
    kind: Kind = "smooth"
    in_legend: bool = True
    """Whether the legend lists the series."""


class Size(NamedTuple):
    """Size of a drawing in CSS pixels, and its level of detail."""

    width: int
    height: int
    bins: int
    """Maximum number of points per line."""
    labels: int
    """Approximate number of labels of the horizontal axis."""


WIDE, NARROW, SMALL = Size(1012, 400, 640, 10), Size(358, 320, 240, 4), Size(316, 200, 240, 3)
"""Sizes for a large chart on a desktop and on a phone, and for a small chart."""


class Tick(NamedTuple):
    """Label of an axis and its position."""

    position: float
    label: str


class Shape(NamedTuple):
    """Geometry of one series: SVG paths and the positions of its points."""

    color: str
    band: str
    line: str
    bars: str
    points: list[tuple[float, float]]


class Level(NamedTuple):
    """Horizontal line of a baseline or of the score of a random choice."""

    label: str
    color: str
    """CSS class of the colour and the line."""
    value: float


class Axis(NamedTuple):
    """Vertical axis, linear or logarithmic, and what is drawn on it."""

    kind: str
    ticks: list[Tick]
    shapes: list[Shape]
    levels: list[tuple[float, str]]
    """Vertical position and CSS class of each horizontal line."""


class PlacedMark(NamedTuple):
    """Mark at a position of a drawing."""

    x: float
    y: float
    mark: Mark
    label: str
    """Empty for a mark whose label would overlap another label."""
    anchor: str


class Drawing(NamedTuple):
    """Chart in one size."""

    size: Size
    left: float
    right: float
    top: float
    bottom: float
    end: float
    """Number of tokens at the right edge."""
    ticks: list[Tick]
    axes: list[Axis]
    marks: list[PlacedMark]
    arrows: list[Tick]
    """Labels of the baselines outside the axes, with their vertical positions."""


@dataclass(frozen=True)
class Chart:
    """Chart of series against tokens seen."""

    name: str
    """Unique name on the page."""
    title: str
    caption: str
    unit: Unit
    series: Sequence[Series]
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Values of baselines by label: horizontal lines, or labels with an arrow if they are far from all values."""
    chance: float | None = None
    """Value of a random choice, which is always inside the axes."""
    events: Sequence[Event] = ()
    batch_tokens: int | None = None
    """Tokens per step, with which the page shows the step; None for a chart of several runs or of scores."""
    sizes: Sequence[Size] = (SMALL,)

    @property
    def is_large(self) -> bool:
        """Whether the chart has a wide and a narrow drawing."""
        return len(self.sizes) > 1

    @property
    def end(self) -> float:
        """Number of tokens at the right edge."""
        return max((float(series.curve.tokens[-1]) for series in self.series if len(series.curve)), default=0) or 1.0

    @cached_property
    def span(self) -> tuple[float, float]:
        """Range of all values, the chance level and the nearby baselines."""
        curves = [series.curve for series in self.series]
        chance = [] if self.chance is None else [self.chance]
        low = min([*chance, *(curve.low.min() for curve in curves)])
        high = max([*chance, *(curve.high.max() for curve in curves)])
        return readable_range(float(low), float(high), self.baselines.values())

    @property
    def levels(self) -> list[Level]:
        """Horizontal lines."""
        low, high = self.span
        levels = [
            Level(label, f"level-{number % 3}", value) for number, (label, value) in enumerate(self.baselines.items())
        ]
        found = [level for level in levels if low <= level.value <= high]
        return found if self.chance is None else [*found, Level("random choice", "chance", self.chance)]

    @property
    def categories(self) -> list[Category]:
        """Categories of marks, the lowest track first."""
        found = set(map(event_category, self.events))
        return [category for category in CATEGORIES if category in found]

    @property
    def starts_logarithmic(self) -> bool:
        """Whether the logarithmic axis is shown first, because a linear axis would hide most values."""
        curve = self.series[0].curve
        return self.unit.format == "number" and bool(curve.high.max() > 30 * np.median(curve.mean) > 0)

    @property
    def drawings(self) -> list[Drawing]:
        """Drawing of each size."""
        return [self._draw(size) for size in self.sizes]

    @property
    def values(self) -> str:
        """JSON of the values that the page shows under the pointer."""
        series = []
        for one in self.series:
            thin = downsample(one.curve, self.sizes[0].bins)
            found = {"label": one.label, "kind": one.kind, "x": thin.tokens, "y": _line(one, thin)}
            if one.kind != "points":
                found |= {"low": thin.low, "high": thin.high}
            rounded = {
                name: [float(f"{number:.6g}") for number in value] if isinstance(value, np.ndarray) else value
                for name, value in found.items()
            }
            series.append(rounded)
        values = {"unit": self.unit.label, "format": self.unit.format, "batch": self.batch_tokens, "series": series}
        return json.dumps(values, separators=(",", ":"))

    def _draw(self, size: Size) -> Drawing:
        thin = [downsample(one.curve, size.bins) for one in self.series]
        ranges = {"linear": self._linear_range(), "log": self._log_range(thin)}
        ticks = {kind: _ticks(*bounds, kind, self.unit) for kind, bounds in ranges.items() if bounds}
        longest = max((len(label) for found in ticks.values() for _, label in found), default=1)
        left, right = 8 + _CHARACTER * longest, size.width - 8
        labels = far_labels(self.baselines, *self.span)
        top = 22 + _TRACK * len(self.categories) + _ARROW * len(labels)
        bottom = size.height - 34
        arrows = [Tick(top - 9 - _ARROW * number, label) for number, label in enumerate(reversed(labels), 1)]

        def x(tokens: Floats) -> Floats:
            return left + (right - left) * tokens / self.end

        def axis(kind: str, low: float, high: float) -> Axis:
            scale = np.log if kind == "log" else np.asarray

            def y(values: Floats) -> Floats:
                with np.errstate(all="ignore"):  # values below the range, such as the logarithm of zero
                    place = (scale(values) - scale(low)) / (scale(high) - scale(low))
                found: Floats = bottom - (bottom - top) * np.clip(np.nan_to_num(place, nan=0, neginf=0), 0, 1)
                return found

            levels = [(float(y(np.array(level.value))), level.color) for level in self.levels]
            shapes = [_shape(one, curve, x, y) for one, curve in zip(self.series, thin, strict=True)]
            placed = [Tick(float(y(np.array(value))), label) for value, label in ticks[kind]]
            return Axis(kind, placed, shapes, levels)

        steps = _steps(0, self.end, size.labels)
        places = [Tick(left + (right - left) * value / self.end, format_count(value)) for value in steps]
        axes = [axis(kind, *bounds) for kind, bounds in ranges.items() if bounds]
        return Drawing(size, left, right, top, bottom, self.end, places, axes, self._placed_marks(left, right), arrows)

    def _linear_range(self) -> tuple[float, float]:
        low, high = self.span
        if self.unit.starts_at_zero and low >= 0:
            return 0.0, 1.08 * high or 1.0
        size = max(abs(low), abs(high))
        margin = 0.05 * (high - low) if high - low > 1e-6 * size else 0.05 * size or 1.0
        return low - margin, high + margin

    def _log_range(self, curves: Sequence[Curve]) -> tuple[float, float] | None:
        """Return the range of the positive values; None without positive values."""
        parts = [part for curve in curves for part in (curve.low, curve.high, curve.mean)]
        values = np.concatenate([*parts, [level.value for level in self.levels]])
        positive = values[values > 0]
        if not len(positive):
            return None
        low, high = float(positive.min()), float(positive.max())
        margin = max(1.02, (high / low) ** 0.05)
        return low / margin, high * margin

    def _placed_marks(self, left: float, right: float) -> list[PlacedMark]:
        if self.batch_tokens is None:
            return []
        found, placed = marks_of(self.events, self.batch_tokens, self.end * 6 / (right - left)), []
        for track, category in enumerate(reversed(self.categories)):
            free = -math.inf
            for mark in (mark for mark in found if mark.category == category):
                x, width = left + (right - left) * min(1.0, mark.tokens / self.end), _CHARACTER * len(mark.label)
                anchor = "end" if x + width / 2 > right else "start" if x - width / 2 < 0 else "middle"
                start = x - {"end": width, "start": 0, "middle": width / 2}[anchor]
                label = mark.label if start > free else ""
                free = start + width + _CHARACTER if label else free
                placed.append(PlacedMark(x, _TRACK * (track + 0.75), mark, label, anchor))
        return placed


def _line(series: Series, thin: Curve) -> Floats:
    return running_mean(thin) if series.kind == "smooth" else thin.mean


def _shape(series: Series, thin: Curve, x: Callable[[Floats], Floats], y: Callable[[Floats], Floats]) -> Shape:
    tokens, line = x(thin.tokens), y(_line(series, thin))
    band, bars, points = "", "", list[tuple[float, float]]()
    if series.kind in ("smooth", "line"):
        places, values = min_max_envelope(thin)
        band = _path(x(places), y(values))
    elif len(thin) <= MAX_MARKERS:
        points = [(round(float(one), 1), round(float(other), 1)) for one, other in zip(tokens, line, strict=True)]
    if series.kind == "errors":
        ends = zip(tokens, y(thin.low), y(thin.high), strict=True)
        bars = "".join(f"M{place:.1f} {low:.1f}V{high:.1f}" for place, low, high in ends)
    return Shape(series.color, band, _path(tokens, line), bars, points)


def _path(x: Floats, y: Floats) -> str:
    """Return an SVG path through points."""
    return "M" + " ".join(f"{value:.1f}" for value in np.column_stack([x, y]).reshape(-1))


def _steps(low: float, high: float, count: int) -> list[float]:
    """Return at most about `count` round values between two values."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= 0.999 * rough)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _ticks(low: float, high: float, kind: str, unit: Unit) -> list[tuple[float, str]]:
    values = _steps(low, high, 5)
    if kind == "log":
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if high / low < 500 else (1,)
        round_values = (factor * 10.0**power for power in powers for factor in factors)
        found = [value for value in round_values if low <= value <= high]
        values = found[:: math.ceil(len(found) / 9)] if len(found) > 2 else [value for value in values if value > 0]
    return [(value, _FORMATS[unit.format](value)) for value in values]
