"""The plot of docs/benchmarks.png: one panel per question, each with its own axis from zero.

A panel has the measures of one section that have the same unit. A bar is the median of the rounds, and the line on it
is their range. The label of another program has the ratio of `measuring.ratios`.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import OURS, Measure, Results, number, ratios

TIMES = "\N{MULTIPLICATION SIGN}"
QUESTIONS = {
    ("training", "tokens/s"): "How fast is training?",
    ("training", "%"): "How close is training to the fastest matrix product?",
    ("training", "GB"): "How much memory does training need?",
    ("quality", "bits/byte"): "How good is a model after equal minutes?",
    ("evaluation", "s"): "How long does an evaluation take?",
    ("starting", "s"): "How long does a start take?",
    ("tokenization", "MB/s"): "How fast does text become tokens?",
    ("deduplication", "MB/s"): "How fast are similar documents and evaluation items found?",
    ("deduplication", "GB/s"): "How fast are equal documents found?",
    ("cleaning", "MB/s"): "How fast is web text cleaned?",
    ("loading", "M tokens/s"): "How fast are batches read?",
    ("resuming", "s"): "How long does it take to resume?",
}
"""Title of each panel, by section and unit, in the order of the panels."""
OURS_INK, PEER_INK, WORSE_INK, TEXT = "#2a6fbb", "#c3c9d1", "#d95f02", "#333333"
COLUMN, BARS, NAMES = 5.5, 3.75, 1.6
"""Widths in inches: a column, its bars with their labels, and the names of the programs, to the left of the bars."""
ROW, TITLE, FOOTER = 0.19, 0.55, 0.35
"""Heights in inches: a row, the space for a panel's title, and the footer."""
LABELS = 0.36
"""Part of the width of the bars that is reserved for the label of the longest bar."""


def draw(results: Results) -> Figure:
    """Draw the panels in two columns of about the same height."""
    panels = list(panels_of(results))
    heights = [TITLE + ROW * num_rows(measures) for _, measures in panels]
    first = min(range(1, len(panels) + 1), key=lambda count: abs(sum(heights[:count]) - sum(heights[count:])))
    width, height = 2 * COLUMN, max(sum(heights[:first]), sum(heights[first:])) + FOOTER
    figure = Figure(figsize=(width, height), dpi=160)
    for column, shown in enumerate((panels[:first], panels[first:])):
        left, bottom = column * COLUMN + NAMES, height
        for title, measures in shown:
            rows = ROW * num_rows(measures)
            bottom -= TITLE + rows
            axes = figure.add_axes((left / width, bottom / height, BARS / width, rows / height))
            draw_panel(axes, title, measures)
    footer = (
        f"Bar and number: median of the rounds, {results.date}; line: their range. "
        f"{TIMES}: how many times better {OURS} is in the same round; orange if it is worse."
    )
    figure.text(0.1 / width, 0.1 / height, footer, fontsize=8, color=TEXT)
    return figure


def panels_of(results: Results) -> Iterator[tuple[str, list[Measure]]]:
    """Yield the title and the measures of each panel; measures of tinyllama alone are excluded."""
    panels: dict[str, list[Measure]] = {question: [] for question in QUESTIONS.values()}
    for measure in results.measures:
        if len(measure.programs) > 1:
            panels[QUESTIONS[measure.section, measure.unit]].append(measure)
    for question, measures in panels.items():
        if measures:
            better = "more" if measures[0].more_is_better else "less"
            yield f"{question} ({measures[0].unit}, {better} is better)", measures


def num_rows(measures: Sequence[Measure]) -> int:
    """Return the number of rows of a panel: one per measure and one per program."""
    return sum(1 + len(measure.programs) for measure in measures)


def draw_panel(axes: Axes, title: str, measures: Sequence[Measure]) -> None:
    """Draw the measures of a panel, one below the other."""

    def write(text: str, left: float, row: float, **style: Any) -> None:
        """Write a text `left` inches to the right of the start of the bars."""
        transform = axes.get_yaxis_transform()
        axes.text(left / BARS, row, text, transform=transform, va="center", **{"fontsize": 8, "color": TEXT} | style)

    row = 0
    write(title, 0.1 - NAMES, row - 1.1, fontsize=9.5, weight="bold", color=OURS_INK)
    for measure in measures:
        write(measure.name.replace("`", ""), 0.1 - NAMES, row, weight="bold")
        for name, program in measure.programs.items():
            row += 1
            write(name, -0.08, row, ha="right")
            draw_bar(axes, row, program.values, None if name == OURS else ratios(measure, name))
        row += 1
    largest = max(value for measure in measures for program in measure.programs.values() for value in program.values)
    axes.set(xlim=(0, largest / (1 - LABELS)), ylim=(row - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_bar(axes: Axes, row: int, values: Sequence[float], factors: Sequence[float] | None) -> None:
    """Draw a program's median and range; `factors` are the ratios of tinyllama to another program."""
    label, ink = number(statistics.median(values)), TEXT
    if factors:
        factor = statistics.median(factors)
        label, ink = f"{label},  {number(factor)}{TIMES}", TEXT if factor >= 1 else WORSE_INK
    axes.barh(row, statistics.median(values), height=0.72, color=PEER_INK if factors else OURS_INK)
    axes.plot([min(values), max(values)], [row, row], color=TEXT, linewidth=1)
    place = (max(values), row), (5, 0)
    axes.annotate(label, *place, textcoords="offset points", va="center", fontsize=8, color=ink)
