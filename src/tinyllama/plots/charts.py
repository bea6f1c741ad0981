"""Plots of runs and plans with matplotlib, as PNG files for model cards and plans.

Functions such as `draw_scores` draw into a figure. `save_png` adds the legend and the axis labels, and writes the file.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tinyllama.files import atomic_write
from tinyllama.formatting import format_count
from tinyllama.plots.curves import Curve, downsample, min_max_envelope, running_mean, summarize_metrics

Draw = Callable[[Figure], object]

TRAINING, VALIDATION = "#2a6fbb", "#d95f02"
_TEXT, _AXIS = "#333333", "#bbbbbb"
_GRID: dict[str, Any] = {"color": "#808080", "alpha": 0.2, "linewidth": 0.8}
_CHANCE = "#7a828e"
_LINE_STYLES = ("--", "-.", ":")

_SETTINGS: dict[Any, Any] = {"text.parse_math": False, "axes.formatter.useoffset": False}
"""Settings that disable axis offsets, and math text, which would hide dollar signs in names."""
MAX_MARKERS = 60
"""Maximum number of points for which a line has markers."""


def loss_plot(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write a plot of training and validation loss (nats per token) against tokens seen, as a PNG file.

    A row has `tokens`, `loss` and, if measured, `validation_loss`. Values that are not finite are skipped.
    """
    curves = summarize_metrics(rows).curves
    save_png(lambda figure: _draw_loss(figure, curves), path, "cross-entropy loss (nats per token)")


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


def _draw_loss(figure: Figure, curves: Mapping[str, Curve]) -> None:
    """Draw raw loss, smoothed loss and validation loss."""
    raw, validation = downsample(curves["loss"], 2000), downsample(curves["validation_loss"], 200)
    axes = figure.add_subplot()
    axes.plot(*min_max_envelope(raw), color=TRAINING, alpha=0.5, linewidth=0.8, label="training, every step")
    axes.plot(raw.tokens, running_mean(raw), color=TRAINING, linewidth=1.8, label="training, running mean")
    if len(validation):
        marker = "o" if len(validation) <= MAX_MARKERS else ""
        style: dict[str, Any] = {"linewidth": 1.6, "marker": marker, "markersize": 4}
        axes.plot(validation.tokens, validation.mean, color=VALIDATION, label="validation", **style)
    _style_axes(axes)


def draw_scores(figure: Figure, releases: Mapping[str, Sequence[Mapping[str, Any]]], chance: float) -> None:
    """Draw the HellaSwag scores in the result of `releases_table` with standard errors, the chance level and baselines.

    `chance` is the score of a random choice in per cent. Baselines outside the axis are labels above the axes.
    """
    rows = [row for row in releases["releases"] if row["hellaswag"] is not None]
    tokens, scores, errors = ([row[key] or 0 for row in rows] for key in ("tokens", "hellaswag", "stderr"))
    axes, label = figure.add_subplot(), f"{rows[-1]['name']}, ± standard error"
    axes.plot(tokens, scores, color=TRAINING, label=label, linewidth=1.6, marker="o", markersize=4)
    axes.errorbar(tokens, scores, errors, fmt="none", ecolor=TRAINING, capsize=3)
    axes.axhline(chance, color=_CHANCE, linewidth=1.2, label=f"random choice: {chance:.4g}")
    _style_axes(axes)
    levels = baseline_levels(releases)
    ends = [score + side * error for score, error in zip(scores, errors, strict=True) for side in (-1, 1)]
    low, high = readable_range(min(chance, *ends), max(chance, *ends), levels.values())
    for number, (name, score) in enumerate(levels.items()):
        if low <= score <= high:
            style = _LINE_STYLES[number % 3]
            axes.axhline(score, color=VALIDATION, linestyle=style, linewidth=1.2, label=f"{name}: {score:.4g}")
    margin = 0.05 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    arrows = "\n".join(far_labels(levels, low, high))
    axes.set_title(arrows, loc="right", fontsize="small", color=VALIDATION)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=_TEXT, fontsize="small")


def baseline_levels(releases: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Return the HellaSwag score of each baseline in the result of `releases_table`, by label.

    If a baseline has several rows, such as one per checkpoint, only the last row is returned.
    """
    last = {row["name"].partition(" step ")[0]: row for row in releases["baselines"] if row["hellaswag"] is not None}
    found = {}
    for name, row in last.items():
        after = "" if row["tokens"] is None else f" after {format_count(row['tokens'])} tokens"
        found[f"{name}{after} ({row['source'].partition(',')[0]})"] = row["hellaswag"]
    return found


def readable_range(low: float, high: float, levels: Iterable[float]) -> tuple[float, float]:
    """Extend the range from `low` to `high` to the levels that are at most its height away from it.

    Levels further away would flatten the scores, so a plot shows them as arrows.
    """
    height = high - low
    near = [level for level in levels if low - height <= level <= high + height]
    return min([low, *near]), max([high, *near])


def far_labels(levels: Mapping[str, float], low: float, high: float) -> list[str]:
    """Return a label with an arrow and the value for each level outside a range, the highest level first."""
    outside = {label: level for label, level in levels.items() if not low <= level <= high}
    return [
        f"{'↑' if outside[label] > high else '↓'} {label}: {outside[label]:.4g}"
        for label in sorted(outside, key=outside.__getitem__, reverse=True)
    ]


def save_png(draw: Draw, path: Path, ylabel: str | None = None) -> None:
    """Write a plot, 1600 x 900 pixels on white; if `ylabel` is given, add the axis labels and any missing legend."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(8, 4.5), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        if ylabel is not None:
            axes = figure.axes[-1]
            axes.set_xlabel("tokens seen", color=_TEXT)
            axes.set_ylabel(ylabel, color=_TEXT)
            if not figure.legends:
                axes.legend(framealpha=1, edgecolor="white", labelcolor=_TEXT)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=200)


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
