"""How time and cost scale with the number of GPUs: a plan for each, and a picture of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tinyllama.errors import InputError
from tinyllama.files import atomic_write


def parse_sweep(text: str) -> list[int]:
    """Numbers of GPUs from `gpus=8,16,64`. Raises InputError where it does not read so."""
    name, _, values = text.partition("=")
    counts = values.split(",")
    if name != "gpus" or not all(count.isascii() and count.isdecimal() and int(count) > 0 for count in counts):
        raise InputError(f"--sweep {text}: give numbers of GPUs, such as gpus=8,16,64,512")
    return sorted({int(count) for count in counts})


def sweep_plot(title: str, points: Sequence[tuple[int, Mapping[str, Any]]], path: Path) -> None:
    """Draw days, and cost or else GPU-hours, losses included, against GPUs, with the line of perfect scaling."""
    figure = Figure(figsize=(8, 4.5), facecolor="white", layout="constrained")
    axes = figure.subplots(1, 2)
    gpus = [count for count, _ in points]
    taken = [found["days_with_losses"] for _, found in points]
    axes[0].plot(gpus, taken, marker="o", linewidth=2.5, label="with failures and checkpoints")
    perfect = [taken[0] * gpus[0] / count for count in gpus]
    axes[0].plot(gpus, perfect, "--", color="black", linewidth=1, label="perfect scaling")
    has_cost = points[0][1]["cost"] is not None
    paid = [found["cost" if has_cost else "gpu_hours_with_losses"] for _, found in points]
    axes[1].plot(gpus, paid, marker="o", label="with failures and checkpoints")
    for place, name in enumerate(("days", "cost" if has_cost else "GPU-hours")):
        axes[place].set(xscale="log", xlabel="GPUs", ylabel=name, xticks=gpus, xticklabels=gpus)
        axes[place].minorticks_off()
        axes[place].yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes[place].grid(color="#e6e6e6")
        axes[place].legend(frameon=False)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, 1.2 * max(paid))
    figure.suptitle(title, fontsize="medium")
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=200)
