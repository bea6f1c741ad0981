"""The loss curve of a run, for its model card and for the README.

Reads rows of metrics.jsonl, writes a PNG. Every row is drawn, as the least and the greatest loss of at most
2,000 spans, so that a spike in a million steps still shows.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tinyllama.files import write_atomically

_NUM_SPANS = 2000
_SMOOTHED_SHARE = 0.02  # of the rows on screen; about what the eye would average by itself
_BLUE, _ORANGE, _INK = "#2a6fbb", "#d95f02", "#333333"

Floats = NDArray[np.float64]


def loss_plot(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw training and validation loss (nats a token) against tokens seen, 1600 x 900 pixels.

    A row has `tokens`, `loss`, and `validation_loss` where it was measured; what is not finite is left out.
    """
    figure = Figure(figsize=(8, 4.5), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    tokens, loss = _points(rows, "loss")
    axes.plot(*_extremes(tokens, loss), color=_BLUE, alpha=0.4, linewidth=0.8, label="training, every step")
    axes.plot(tokens, _smoothed(loss), color=_BLUE, linewidth=1.8, label="training, running mean")
    validated, validation_loss = _points(rows, "validation_loss")
    if len(validated):
        axes.plot(validated, validation_loss, color=_ORANGE, marker="o", markersize=4, label="validation")
    _dress(axes, "cross-entropy loss (nats per token)")
    _save(figure, path)


def score_plot(releases: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw a run's HellaSwag acc_norm, with standard errors, against tokens seen, and the baselines as lines.

    `releases` is `releases_table`'s. Of a baseline with several rows, such as a model's own checkpoints, the last
    is drawn.
    """
    figure = Figure(figsize=(8, 4.5), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in releases["releases"] if row["hellaswag"] is not None]
    tokens, scores, errors = ([row[key] for row in rows] for key in ("tokens", "hellaswag", "stderr"))
    axes.errorbar(tokens, scores, errors, color=_BLUE, marker="o", markersize=4, capsize=3, label=rows[-1]["name"])
    lines = {row["name"].partition(" step ")[0]: row for row in releases["baselines"] if row["hellaswag"] is not None}
    for style, (name, row) in zip(itertools.cycle(("--", "-.", ":")), lines.items(), strict=False):
        after = "" if row["tokens"] is None else f" after {short_count(row['tokens'])} tokens"
        label = f"{name}{after} ({row['source'].partition(',')[0]})"
        axes.axhline(row["hellaswag"], color=_ORANGE, linestyle=style, linewidth=1.2, label=label)
    _dress(axes, "HellaSwag acc_norm (per cent)")
    _save(figure, path)


def short_count(count: float) -> str:
    """A count as people say it: 6.01M, 105B, 3T."""
    rounded = float(f"{count:.3g}")
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if rounded >= size:
            return f"{rounded / size:g}{unit}"
    return f"{rounded:g}"


def _points(rows: Sequence[Mapping[str, float]], name: str) -> tuple[Floats, Floats]:
    kept = [(row["tokens"], row[name]) for row in rows if row.get(name) is not None and math.isfinite(row[name])]
    tokens, values = np.array(kept, dtype=np.float64).reshape(-1, 2).T
    return tokens, values


def _extremes(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The curve through the least and the greatest value of each span of rows."""
    spans = np.array_split(np.arange(len(x)), min(len(x), _NUM_SPANS)) if len(x) else []
    values = [extreme for span in spans for extreme in (y[span].min(), y[span].max())]
    return np.repeat([x[span].mean() for span in spans], 2), np.array(values)


def _smoothed(y: Floats) -> Floats:
    """The running mean over a window around each row.

    It narrows at the steep beginning, not to lag behind; at the end it loses its right side only, not to end in noise.
    """
    place = np.arange(len(y))
    before = np.minimum(max(1, round(len(y) * _SMOOTHED_SHARE / 2)), place)
    after = np.minimum(before, place[::-1])
    sums = np.concatenate(([0.0], np.cumsum(y)))
    means: Floats = (sums[place + after + 1] - sums[place - before]) / (before + after + 1)
    return means


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=200)


def _dress(axes: Any, ylabel: str) -> None:
    axes.set_xlabel("tokens seen", color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.xaxis.set_major_formatter(lambda count, _: short_count(count))
    axes.set_xlim(left=0)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color="#bbbbbb", labelcolor=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.legend(framealpha=1, edgecolor="white", labelcolor=_INK)
