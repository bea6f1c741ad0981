"""Plots of runs and plans with matplotlib, as PNG files and as SVG for a page.

Functions such as `draw_loss` draw into a figure. `save_png` adds the legend and the axis labels, and writes a PNG file.
`draw_svg` returns SVG without a legend and axis labels, because the page adds its own. The colours are chosen for a
light background. On a dark background, the page inverts them with a CSS filter.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tinyllama.files import atomic_write
from tinyllama.formatting import format_bytes, format_count
from tinyllama.plots.curves import Curve, downsample, min_max_envelope, running_mean, summarize_metrics
from tinyllama.runs.log import INFO, INTERRUPTION, PROBLEM, RELEASE, Category, Event, event_category

Draw = Callable[[Figure], object]

TRAINING, VALIDATION = "#2a6fbb", "#d95f02"
_EVENTS = {
    PROBLEM: ("#c62f3b", "skipped, rolled back or failed"),
    INTERRUPTION: ("#7a828e", "stopped by a signal, resumed"),
    RELEASE: ("#1a8754", "release"),
}
"""Colour and legend of each category of events, the lowest track first."""
_RUNS = ("#2a6fbb", "#d95f02", "#7b52ab", "#12867f", "#c2378b", "#8a7a12")
_TEXT, _AXIS = "#333333", "#bbbbbb"
_GRID: dict[str, Any] = {"color": "#808080", "alpha": 0.2, "linewidth": 0.8}
_LINE_STYLES = ("-", "--", "-.", ":")

_SETTINGS: dict[Any, Any] = {"text.parse_math": False, "axes.formatter.useoffset": False}
"""Settings that disable axis offsets, and math text, which would hide dollar signs in names."""
_SVG_SETTINGS: dict[Any, Any] = {
    **_SETTINGS,
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.linewidth": 0.8,
    "font.sans-serif": ["DejaVu Sans"],
}
_POINTS_PER_INCH = 72
_MAX_MARKERS = 60
"""Maximum number of points for which a line has markers."""

_VALUE_FORMATS: dict[str, Callable[[float], str]] = {
    "percent": lambda value: f"{100 * value:.0f} %",
    "bytes": lambda value: format_bytes(value) if value else "0",
    "count": format_count,
    "rate": lambda value: f"{value:.3g}",
}


@dataclass(frozen=True)
class Annotation:
    """One or several nearby events of a category, which a plot shows as one annotation."""

    tokens: float
    """Mean position of the events."""
    category: Category
    names: Mapping[str, int]
    """Number of events by name."""

    @property
    def count(self) -> int:
        """Number of events."""
        return sum(self.names.values())

    @property
    def label(self) -> str:
        """Text of the annotation, such as `rollback`, `3 skips` or `4 events`.

        If some events are named `resume`, only those are counted, because a stop and a resume are one interruption.
        """
        names = {"resume": self.names["resume"]} if "resume" in self.names else self.names
        if len(names) > 1:
            return f"{self.count} events"
        ((name, count),) = names.items()
        return name if count == 1 else f"{count} {name}s"


def annotations(events: Iterable[Event], batch_tokens: int, min_distance: float) -> list[Annotation]:
    """Return annotations for all non-routine events, merged as described in `merge_nearby`."""
    found = (Annotation(event["step"] * batch_tokens, event_category(event), {event["event"]: 1}) for event in events)
    return merge_nearby([annotation for annotation in found if annotation.category != INFO], min_distance)


def merge_nearby(found: Sequence[Annotation], min_distance: float) -> list[Annotation]:
    """Merge annotations of the same category if the first and the last are less than `min_distance` tokens apart."""
    groups: list[list[Annotation]] = []
    for annotation in sorted(found, key=lambda annotation: (annotation.category, annotation.tokens)):
        first = groups[-1][0] if groups else None
        if first and first.category == annotation.category and annotation.tokens - first.tokens < min_distance:
            groups[-1].append(annotation)
        else:
            groups.append([annotation])
    merged = []
    for group in groups:
        names: Counter[str] = Counter()
        for annotation in group:
            names.update(annotation.names)
        tokens = sum(annotation.tokens * annotation.count for annotation in group) / names.total()
        merged.append(Annotation(tokens, group[0].category, dict(names)))
    return merged


def loss_plot(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write a plot of training and validation loss (nats per token) against tokens seen, as a PNG file.

    A row has `tokens`, `loss` and, if measured, `validation_loss`. Values that are not finite are skipped.
    """
    curves = summarize_metrics(rows).curves
    save_png(lambda figure: draw_loss(figure, curves, max_bins=2000), path, "cross-entropy loss (nats per token)")


def sweep_plot(title: str, plans: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    """Write a plot of a plan's days and cost (or GPU-hours, without a price) against the number of GPUs."""
    gpus, figures = list(plans), list(plans.values())
    days = [found["days_with_losses"] for found in figures]
    cost_label, key = ("GPU-hours", "gpu_hours_with_losses") if figures[0]["cost"] is None else ("cost", "cost")
    costs = [found[key] for found in figures]

    def draw(figure: Figure) -> None:
        time_axes, cost_axes = figure.subplots(1, 2)
        time_axes.plot(gpus, days, color=TRAINING, marker="o", label="with failures and checkpoints")
        ideal = [days[0] * gpus[0] / count for count in gpus]
        time_axes.plot(gpus, ideal, "--", color="black", linewidth=1, label="perfect scaling")
        time_axes.set_yscale("log")
        time_axes.legend(frameon=False)
        cost_axes.plot(gpus, costs, color=TRAINING, marker="o")
        cost_axes.set_ylim(0, 1.2 * max(costs))
        for axes, label in ((time_axes, "days"), (cost_axes, cost_label)):
            axes.set(xscale="log", xlabel="GPUs", ylabel=label, xticks=gpus, xticklabels=gpus)
            axes.minorticks_off()
            axes.tick_params(axis="x", labelrotation=45)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.grid(**_GRID)
        figure.suptitle(title, fontsize="medium")

    save_png(draw, path)


def draw_loss(
    figure: Figure, curves: Mapping[str, Curve], events: Sequence[Annotation] = (), max_bins: int = 900,
    max_labels: int = 10,
) -> None:  # fmt: skip
    """Draw raw loss, smoothed loss and validation loss, below one track of annotations per category of events."""
    raw, validation = downsample(curves["loss"], max_bins), downsample(curves["validation_loss"], 200)
    axes = _add_event_tracks(figure, events, max_labels, float(raw.tokens[-1]) if len(raw) else 1.0)
    axes.plot(*min_max_envelope(raw), color=TRAINING, alpha=0.5, linewidth=0.8, label="training, every step")
    axes.plot(raw.tokens, running_mean(raw), color=TRAINING, linewidth=1.8, label="training, running mean")
    if len(validation):
        style = _point_style(len(validation))
        axes.plot(validation.tokens, validation.mean, color=VALIDATION, label="validation", **style)
    _style_axes(axes)


def draw_metric(figure: Figure, curve: Curve, unit: str, color: str = TRAINING, max_bins: int = 320) -> None:
    """Draw a metric against tokens seen: a pale line for the range of its values, and a line for its running mean.

    `unit` is a key of `_VALUE_FORMATS`, `norm` for a norm of gradients, or `points` for a metric that is measured only
    at some steps.
    """
    axes, thin = figure.add_subplot(), downsample(curve, max_bins)
    if unit == "points":
        axes.plot(thin.tokens, thin.mean, color=color, **_point_style(len(thin)))
    else:
        axes.plot(*min_max_envelope(thin), color=color, alpha=0.5, linewidth=0.8)
        axes.plot(thin.tokens, thin.mean if unit == "rate" else running_mean(thin), color=color, linewidth=1.6)
    if unit in _VALUE_FORMATS:
        axes.set_ylim(bottom=0, top=1.08 * float(thin.high.max()) or 1)
        axes.yaxis.set_major_formatter(lambda value, _: _VALUE_FORMATS[unit](value))
    elif unit == "norm" and thin.high.max() > 30 * sorted(thin.mean)[len(thin) // 2]:
        axes.set_yscale("log")
        # matplotlib labels a logarithmic axis with math text by default, but _SETTINGS disables math text
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("")
    _style_axes(axes)


def draw_scores(figure: Figure, releases: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw the HellaSwag scores in the result of `releases_table` with standard errors, and the baselines as lines.

    If a baseline has several rows, such as one per checkpoint, only the last row is drawn.
    """
    rows = [row for row in releases["releases"] if row["hellaswag"] is not None]
    points = [(row["tokens"], row["hellaswag"], row["stderr"] or 0) for row in rows]
    axes = draw_task(figure, points, f"{rows[-1]['name']}, ± standard error")
    baselines = {
        row["name"].partition(" step ")[0]: row for row in releases["baselines"] if row["hellaswag"] is not None
    }
    for number, (name, row) in enumerate(baselines.items()):
        after = "" if row["tokens"] is None else f" after {format_count(row['tokens'])} tokens"
        label = f"{name}{after} ({row['source'].partition(',')[0]})"
        style = _LINE_STYLES[1 + number % 3]
        axes.axhline(row["hellaswag"], color=VALIDATION, linestyle=style, linewidth=1.2, label=label)


def draw_task(figure: Figure, points: Sequence[tuple[float, float, float]], label: str = "") -> Axes:
    """Draw scores against tokens seen. A point is (tokens, score, standard error); the last two are in per cent."""
    axes = figure.add_subplot()
    tokens, scores, errors = zip(*points, strict=True)
    axes.plot(tokens, scores, color=TRAINING, label=label, **_point_style(1))
    axes.errorbar(tokens, scores, errors, fmt="none", ecolor=TRAINING, capsize=3)
    _style_axes(axes)
    return axes


def draw_comparison(figure: Figure, runs: Mapping[str, Mapping[str, Curve]], max_bins: int) -> None:
    """Draw the loss of several runs: pale bands for ranges, lines for running means, points for the validation loss."""
    axes = figure.add_subplot()
    for number, (name, curves) in enumerate(runs.items()):
        color, style = _RUNS[number % len(_RUNS)], _LINE_STYLES[number // len(_RUNS) % len(_LINE_STYLES)]
        raw, validation = downsample(curves["loss"], max_bins), downsample(curves["validation_loss"], 50)
        # The label starts with a space, since matplotlib omits labels that start with _ from legends.
        axes.plot(*min_max_envelope(raw), color=color, alpha=0.35, linewidth=0.6)
        axes.plot(raw.tokens, running_mean(raw), color=color, linestyle=style, linewidth=1.8, label=f" {name}")
        axes.plot(validation.tokens, validation.mean, "o", color=color, markersize=3.5)
    _style_axes(axes)


def save_png(draw: Draw, path: Path, ylabel: str | None = None) -> None:
    """Write a plot, 1600 x 900 pixels on white; if `ylabel` is given, add a legend and the axis labels."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(8, 4.5), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        if ylabel is not None:
            axes = figure.axes[-1]
            axes.set_xlabel("tokens seen", color=_TEXT)
            axes.set_ylabel(ylabel, color=_TEXT)
            axes.legend(framealpha=1, edgecolor="white", labelcolor=_TEXT)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=200)


def draw_svg(draw: Draw, size: tuple[int, int], name: str) -> tuple[Markup, list[Line2D]]:
    """Return a plot as SVG for an HTML page, and the plot's lines that belong in a legend.

    `size` is width and height in CSS pixels. `name` must be unique on the page, because the ids in the SVG contain it.
    """
    svg = io.StringIO()
    with mpl.rc_context({**_SVG_SETTINGS, "svg.hashsalt": name}):
        width, height = (pixels / _POINTS_PER_INCH for pixels in size)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=metadata)
    lines: list[Any] = [line for axes in reversed(figure.axes) for line in axes.get_legend_handles_labels()[0]]
    text = svg.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # ids of groups are unused
    # Round the coordinates in tags to 0.01 pixels; do not change numbers in the text between tags.
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"-?\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", tag[0]), text)
    return Markup(text), lines


def _add_event_tracks(figure: Figure, events: Sequence[Annotation], max_labels: int, end: float) -> Axes:
    """Draw a track for each category of events, and return the axes for the curves; `end` is the last x value."""
    categories = [category for category in _EVENTS if any(event.category == category for event in events)]
    if not categories:
        return figure.add_subplot()
    # space for a marker with a label above it
    height = len(categories) * 22 / _POINTS_PER_INCH / figure.get_figheight()
    tracks: Axes
    axes: Axes
    tracks, axes = figure.subplots(2, 1, sharex=True, height_ratios=[height, 1 - height])
    tracks.set_axis_off()
    tracks.set_ylim(-0.3, len(categories))
    alpha = 0.45 if len(events) <= 12 else 0.2  # many lines must not hide the curve
    for event in events:
        axes.axvline(event.tokens, color=_EVENTS[event.category][0], alpha=alpha, linewidth=0.7)
    for y, category in enumerate(categories):
        (color, label), own = _EVENTS[category], [event for event in events if event.category == category]
        x = [event.tokens for event in own]
        tracks.plot(x, [y] * len(x), "o", color=color, markersize=4.5, clip_on=False, label=label)
        for group in merge_nearby(own, end / max_labels):
            side = "right" if group.tokens > 0.9 * end else "left" if group.tokens < 0.1 * end else "center"
            tracks.annotate(
                group.label, (group.tokens, y), (0, 5), textcoords="offset points", ha=side, color=color, fontsize=9
            )
    return axes


def _point_style(count: int) -> dict[str, Any]:
    """Return the style of a line through `count` points, with markers unless there are more than _MAX_MARKERS."""
    return {"linewidth": 1.6, "marker": "o" if count <= _MAX_MARKERS else "", "markersize": 4}


def _style_axes(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda count, _: format_count(count))
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    axes.grid(**_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=_AXIS, labelcolor=_TEXT)
    axes.yaxis.get_offset_text().set_color(_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_AXIS)
    if not math.isfinite(axes.get_xlim()[1]) or axes.get_xlim()[1] <= 0:
        axes.set_xlim(0, 1)
