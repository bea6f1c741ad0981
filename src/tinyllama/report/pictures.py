"""The pictures of a run, drawn with matplotlib: for its report, for its model cards, for the README.

A picture is a function that draws into a figure and returns its key; `save_png` puts the key into the picture, a page
beside it. What is drawn at all is the curves module's business: here are only lines, colours and axes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tinyllama.files import atomic_write
from tinyllama.formatting import format_bytes, format_count
from tinyllama.report.curves import Curve, downsample, min_max_envelope, smoothed, summarize_metrics
from tinyllama.report.marks import Annotation, merge_nearby
from tinyllama.runs.events import INTERRUPTION, PROBLEM, RELEASE

PALETTE = {
    "training": "#2a6fbb",
    "validation": "#d95f02",
    "release": "#1a8754",
    "pause": "#7a828e",
    "trouble": "#c62f3b",
    "run-1": "#2a70bb",
    "run-2": "#d96002",
    "run-3": "#7b52ab",
    "run-4": "#12867f",
    "run-5": "#c2378b",
    "run-6": "#8a7a12",
    "ink": "#333333",
    "axis": "#bbbbbb",
    "grid": "#e6e6e6",
}
"""What a colour stands for -> that colour on white. No two are the same: a page finds them by it."""

SETTINGS: dict[Any, Any] = {"text.parse_math": False, "axes.formatter.useoffset": False}
"""A dollar in a name is a dollar, and a number on an axis is the whole number."""

NUM_RUN_INKS = 6
_PNG_INCHES, _PNG_DPI, _PNG_SPANS = (8, 4.5), 200, 2000
_EVENT_TRACKS = {
    PROBLEM: "skipped, rolled back or failed",
    INTERRUPTION: "stopped by a signal, resumed",
    RELEASE: "release",
}
_DASHES = ("solid", "dashed", "dashdot", "dotted")


@dataclass(frozen=True)
class LegendEntry:
    """An entry of a picture's key."""

    label: str
    ink: str
    """One of INKS."""
    style: str
    """`band` for a pale line, `points` for a line through points, `mark`, or a line: solid, dashed, dashdot, dotted."""


Legend = list[LegendEntry]


def loss_plot(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw training and validation loss (nats a token) against tokens seen, 1600 x 900 pixels.

    A row has `tokens`, `loss`, and `validation_loss` where it was measured; what is not finite is left out.
    """
    curves = summarize_metrics(rows).curves
    save_png(lambda figure: draw_loss(figure, curves, [], _PNG_SPANS), "cross-entropy loss (nats per token)", path)


def score_plot(releases: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw a run's HellaSwag acc_norm, with standard errors, against tokens seen, and the baselines as lines.

    `releases` is `releases_table`'s. Of a baseline with several rows, such as a model's own checkpoints, the last
    is drawn.
    """
    save_png(lambda figure: draw_scores(figure, releases), "HellaSwag acc_norm (per cent)", path)


def draw_loss(
    figure: Figure, curves: Mapping[str, Curve], marks: Sequence[Annotation], spans: int, labels: int = 10
) -> Legend:
    """Loss, raw and smoothed, and validation loss, in nats a token; above them a lane of marks for each kind.

    `spans` bounds the points of the raw curve, `labels` the labels of a lane.
    """
    raw = downsample(curves["loss"], spans)
    axes, keys = _with_lanes(figure, marks, labels, float(raw.tokens[-1]) if len(raw) else 1.0)
    axes.plot(*min_max_envelope(raw), color=PALETTE["training"], alpha=0.5, linewidth=0.8)
    axes.plot(raw.tokens, smoothed(raw), color=PALETTE["training"], linewidth=1.8)
    drawn = [
        LegendEntry("training, every step", "training", "band"),
        LegendEntry("training, running mean", "training", "solid"),
    ]
    validation = downsample(curves["validation_loss"], 200)
    if len(validation):
        axes.plot(validation.tokens, validation.mean, color=PALETTE["validation"], **_points(len(validation)))
        drawn.append(LegendEntry("validation", "validation", "points"))
    _style_axes(axes)
    return drawn + keys


def draw_metric(figure: Figure, curve: Curve, unit: str, spans: int, ink: str = "training") -> Legend:
    """One metric against tokens seen: all of its values pale, its running mean over them.

    `unit` is `share` for one drawn in per cent, `bytes`, `count`, `points` for one that is measured now and then, or
    empty.
    """
    axes, thin = figure.add_subplot(), downsample(curve, spans)
    if unit == "points":
        axes.plot(thin.tokens, thin.mean, color=PALETTE[ink], **_points(len(thin)))
    else:
        axes.plot(*min_max_envelope(thin), color=PALETTE[ink], alpha=0.5, linewidth=0.8)
        axes.plot(thin.tokens, smoothed(thin) if unit != "rate" else thin.mean, color=PALETTE[ink], linewidth=1.6)
    if unit in ("share", "bytes", "count", "rate"):
        axes.set_ylim(bottom=0, top=1.08 * float(thin.high.max()) or 1)
    elif unit == "norm" and thin.high.max() > 30 * _median(thin):
        axes.set_yscale("log")
    _style_axes(axes)
    _format_y_axis(axes, unit)
    return []


def draw_scores(figure: Figure, releases: Mapping[str, Sequence[Mapping[str, Any]]]) -> Legend:
    """HellaSwag acc_norm in per cent of the releases that have it, their standard errors, and the baselines' lines."""
    axes = figure.add_subplot()
    rows = [row for row in releases["releases"] if row["hellaswag"] is not None]
    tokens, scores, errors = ([row[key] for row in rows] for key in ("tokens", "hellaswag", "stderr"))
    axes.errorbar(tokens, scores, [error or 0 for error in errors], color=PALETTE["training"], capsize=3, **_points(1))
    keys = [LegendEntry(f"{rows[-1]['name']}, ± standard error", "training", "points")]
    lines = {row["name"].partition(" step ")[0]: row for row in releases["baselines"] if row["hellaswag"] is not None}
    for number, (name, row) in enumerate(lines.items()):
        style = _DASHES[1 + number % 3]
        axes.axhline(row["hellaswag"], color=PALETTE["validation"], linestyle=style, linewidth=1.2)
        after = "" if row["tokens"] is None else f" after {format_count(row['tokens'])} tokens"
        keys.append(LegendEntry(f"{name}{after} ({row['source'].partition(',')[0]})", "validation", style))
    _style_axes(axes)
    return keys


def draw_task(figure: Figure, points: Sequence[tuple[float, float, float]]) -> Legend:
    """A task's scores, each with tokens and standard error, both of the scores in per cent."""
    axes = figure.add_subplot()
    tokens, scores, errors = zip(*points, strict=True)
    axes.errorbar(tokens, scores, errors, color=PALETTE["training"], capsize=3, **_points(1))
    _style_axes(axes)
    return []


def draw_comparison(figure: Figure, runs: Mapping[str, Mapping[str, Curve]], spans: int) -> Legend:
    """The loss of several runs, running means over pale extremes, and their validations as points."""
    axes, keys = figure.add_subplot(), []
    for number, (name, curves) in enumerate(runs.items()):
        ink, style = f"run-{1 + number % NUM_RUN_INKS}", _DASHES[number // NUM_RUN_INKS % len(_DASHES)]
        raw, validation = downsample(curves["loss"], spans), downsample(curves["validation_loss"], 50)
        axes.plot(*min_max_envelope(raw), color=PALETTE[ink], alpha=0.35, linewidth=0.6)
        axes.plot(raw.tokens, smoothed(raw), color=PALETTE[ink], linestyle=style, linewidth=1.8)
        axes.plot(validation.tokens, validation.mean, "o", color=PALETTE[ink], markersize=3.5)
        keys.append(LegendEntry(name, ink, style))
    _style_axes(axes)
    return keys


def save_png(draw: Callable[[Figure], Legend], ylabel: str, path: Path) -> None:
    """A picture on white with its key inside, 1600 x 900 pixels."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=_PNG_INCHES, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        keys = draw(figure)
        axes = figure.axes[-1]
        axes.set_xlabel("tokens seen", color=PALETTE["ink"])
        axes.set_ylabel(ylabel, color=PALETTE["ink"])
        handles = [_handle(key) for key in keys]
        axes.legend(handles=handles, framealpha=1, edgecolor="white", labelcolor=PALETTE["ink"])
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=_PNG_DPI)


def _handle(key: LegendEntry) -> Line2D:
    """What stands before an entry of the key in a picture."""
    line = Line2D([], [], color=PALETTE[key.ink], label=key.label, linewidth=1.6)
    match key.style:
        case "band":
            line.set(alpha=0.5, linewidth=0.8)
        case "points":
            line.set(marker="o", markersize=4)
        case "mark":
            line.set(marker="o", markersize=6, linestyle="none")
        case style:
            line.set(linestyle=style)
    return line


def _with_lanes(figure: Figure, marks: Sequence[Annotation], labels: int, end: float) -> tuple[Axes, Legend]:
    """The axes to draw in, up to `end` tokens, under one lane for each kind of marks that there is."""
    kinds = [kind for kind in _EVENT_TRACKS if any(mark.kind == kind for mark in marks)]
    if not kinds:
        return figure.add_subplot(), []
    lane = 22 / 72 / figure.get_figheight()  # of the figure: a marker with its label above it
    lanes, axes = figure.subplots(2, 1, sharex=True, height_ratios=[lane * len(kinds), 1 - lane * len(kinds)])
    lanes.set_axis_off()
    lanes.set_ylim(-0.3, len(kinds))
    for height, kind in enumerate(kinds):
        _draw_lane(lanes, height, [mark for mark in marks if mark.kind == kind], end, labels)
    alpha = 0.45 if len(marks) <= 12 else 0.2  # many are a pattern, and must not hide the curve
    for mark in marks:
        axes.axvline(mark.tokens, color=PALETTE[mark.kind], alpha=alpha, linewidth=0.7)
    return axes, [LegendEntry(_EVENT_TRACKS[kind], kind, "mark") for kind in reversed(kinds)]


def _draw_lane(lanes: Axes, height: float, marks: Sequence[Annotation], end: float, labels: int) -> None:
    ink = PALETTE[marks[0].kind]
    lanes.plot([mark.tokens for mark in marks], [height] * len(marks), "o", color=ink, markersize=4.5, clip_on=False)
    for label in merge_nearby(marks, end / labels):
        side = "right" if label.tokens > 0.9 * end else "left" if label.tokens < 0.1 * end else "center"
        lanes.annotate(
            label.label, (label.tokens, height), (0, 5), textcoords="offset points", ha=side, color=ink, fontsize=9
        )


def _points(count: int) -> dict[str, Any]:
    """A line through its points, as long as they can be told apart."""
    return {"linewidth": 1.6, "marker": "o" if count <= 60 else "", "markersize": 4}


def _median(curve: Curve) -> float:
    return float(sorted(curve.mean)[len(curve) // 2])


def _format_y_axis(axes: Axes, unit: str) -> None:
    """Write the values as people say them."""
    say: Callable[[float], str] | None = {
        "share": lambda value: f"{100 * value:.0f} %",
        "bytes": lambda value: format_bytes(value) if value else "0",
        "count": format_count,
        "rate": lambda value: f"{value:.3g}",
    }.get(unit)
    if say:
        axes.yaxis.set_major_formatter(lambda value, _: say(value))


def _style_axes(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda count, _: format_count(count))
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    axes.grid(color=PALETTE["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color=PALETTE["axis"], labelcolor=PALETTE["ink"])
    axes.yaxis.get_offset_text().set_color(PALETTE["ink"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALETTE["axis"])
    if not math.isfinite(axes.get_xlim()[1]) or axes.get_xlim()[1] <= 0:
        axes.set_xlim(0, 1)


def save_sweep_plot(title: str, plans: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    """Draw days and cost, or GPU-hours without a price, against numbers of GPUs; failures are included."""
    gpus, figures = list(plans), list(plans.values())
    days = [found["days_with_losses"] for found in figures]
    has_cost = figures[0]["cost"] is not None
    paid = [found["cost" if has_cost else "gpu_hours_with_losses"] for found in figures]

    def draw(figure: Figure) -> Legend:
        time, cost = figure.subplots(1, 2)
        time.plot(gpus, days, marker="o", linewidth=2.5, label="with failures and checkpoints")
        time.plot(gpus, [days[0] * gpus[0] / count for count in gpus], "--", color="black", label="perfect scaling")
        cost.plot(gpus, paid, marker="o", label="with failures and checkpoints")
        for axes, name in ((time, "days"), (cost, "cost" if has_cost else "GPU-hours")):
            axes.set(xscale="log", xlabel="GPUs", ylabel=name, xticks=gpus, xticklabels=gpus)
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.grid(color=PALETTE["grid"])
            axes.legend(frameon=False)
        time.set_yscale("log")
        cost.set_ylim(0, 1.2 * max(paid))
        figure.suptitle(title, fontsize="medium")
        return []

    save_png(draw, "", path)
