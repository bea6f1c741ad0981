"""Writers of docs/benchmarks.md and its plot, which depend only on a results file.

The table has a row per peer. Below the table, the page explains each measure: the measured quantity, the settings, and
the limits. The plot shows the ratios on a logarithmic axis, so the ratios 2 and 1/2 have equal distances from 1.
"""

import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import OURS, Machine, Measure, Results, comparison, number, ratios, spread

from tinyllama.files import atomic_write

OURS_INK, THEIRS_INK, EVEN_INK, GRID = "#2a6fbb", "#d95f02", "#7a828e", "#e6e6e6"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}
TITLES = {
    "tokenization": "Text to tokens",
    "loading": "Tokens to batches",
    "resuming": "Resuming at 90 % of an epoch",
    "training": "Training",
    "evaluation": "Evaluation",
    "starting": "Start-up",
}


def write_page(results: Results, folder: Path) -> None:
    """Write benchmarks.md and benchmarks.png."""
    with atomic_write(folder / "benchmarks.png") as file:
        FigureCanvasAgg(draw(results)).print_png(file)
    with atomic_write(folder / "benchmarks.md") as file:
        file.write(("\n".join(page(results)) + "\n").encode())


def page(results: Results) -> Iterator[str]:
    """Yield the page's lines."""
    yield from (
        "# Benchmarks",
        "",
        "<!-- Written by `make bench`; benchmarks/bench.py --page docs/benchmarks.json rewrites it. -->",
        "",
        "This page compares the speed and memory of tinyllama with other programs. Each program runs through its",
        "documented interface, with the settings that were fastest on this machine. In each round all programs run",
        "in turn, so that other jobs slow all programs equally. A ratio compares two programs in the same round; a",
        "ratio above 1 means that tinyllama is better. The tables show the median of the rounds, with minimum and",
        "maximum.",
        "",
        "![Speed of tinyllama relative to the other programs, on a logarithmic axis](benchmarks.png)",
        "",
        *machine_lines(results),
        "",
    )
    for section, own in groupby(results.measures, key=lambda measure: measure.section):
        yield from section_lines(TITLES[section], list(own))
    yield from version_lines(results)
    yield from ("", "Next: [log of experiments](log.md), [scale](scale.md).")


def machine_lines(results: Results) -> Iterator[str]:
    """Yield lines that describe the machine and the date."""
    machine = results.machine
    yield from (
        "| | |",
        "|---|---|",
        f"| date | {results.date}, {results.seconds / 60:.0f} minutes in one run (`make bench`) |",
        f"| machine | {machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB; {machine.system} |",
        f"| bf16 2048^3 matrix product on all cores | {dashed(spread(machine.product_gflops, ',.0f'))} GFLOP/s, "
        "before each section and after the last |",
        f"| load average before the first section | {machine.load[0]:.1f}{busy(machine)} |",
        f"| Python, torch | {machine.python}, {machine.torch} |",
    )


def busy(machine: Machine) -> str:
    """Return a warning if other jobs ran."""
    return (
        " (**other jobs ran**, so ratios are more reliable than rates)" if machine.load[0] > machine.cores / 4 else ""
    )


def section_lines(title: str, measures: Sequence[Measure]) -> Iterator[str]:
    """Yield a section: a table, then a description per measure; measures with equal settings share their settings."""
    yield from (f"## {title}", "", "| | program | measured | tinyllama is |", "|---|---|---|---|")
    for measure in measures:
        yield from row_lines(measure)
    yield ""
    for _, alike in groupby(measures, key=lambda measure: (list(settings_lines(measure)), measure.not_shown)):
        own = list(alike)
        yield from (
            part for measure in own for part in (f"**{measure.name}** ({rounds_of(measure)}). {measure.how}", "")
        )
        yield from (*settings_lines(own[0]), f"- Not shown: {own[0].not_shown}", "")


def row_lines(measure: Measure) -> Iterator[str]:
    """Yield a table row per program."""
    for name, program in measure.programs.items():
        rate = f"{dashed(spread(program.values))} {measure.unit}"
        ratio = dashed(comparison(measure, name, ".2f"))
        yield f"| {measure.name} | {name} | {rate} | |" if name == OURS else f"| | {name} | {rate} | {ratio} |"


def rounds_of(measure: Measure) -> str:
    """Format the number of rounds."""
    count = len(measure.programs[OURS].values)
    return "one round" if count == 1 else f"{count} rounds"


def settings_lines(measure: Measure) -> Iterator[str]:
    """Yield a line per program with its settings and its checks."""
    for name, program in measure.programs.items():
        yield f"- {name}: {program.settings}" + (f". Checked: {program.found}" if program.found else "")


def version_lines(results: Results) -> Iterator[str]:
    """Yield the table of versions."""
    versions = {name: program.version for measure in results.measures for name, program in measure.programs.items()}
    yield from ("## Versions", "", "| program | version |", "|---|---|")
    yield from (f"| {name} | {version} |" for name, version in sorted(versions.items()))


def dashed(words: str) -> str:
    """Replace the hyphen of a range by a dash."""
    return words.replace("-", "\N{EN DASH}")


def draw(results: Results) -> Figure:
    """Draw a line per measure and peer: the median and the range of the rounds' ratios."""
    rows = [(measure, peer) for measure in results.measures for peer in measure.programs if peer != OURS]
    height = 0.9 + 0.26 * len(rows)
    figure = Figure(figsize=(10, height), dpi=160)
    axes = figure.add_axes((0.5, 0.6 / height, 0.46, 1 - 0.7 / height))
    for place, (measure, peer) in enumerate(rows):
        draw_ratio(axes, place, ratios(measure, peer))
        if place == 0 or rows[place - 1][0] is not measure:
            draw_name(axes, place, measure.name)
    axes.set_yticks(range(len(rows)), [peer for _, peer in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}\N{MULTIPLICATION SIGN}")
    axes.axvline(1, color=EVEN_INK, linewidth=1.2)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.set_xlabel(
        f"speed relative to the program (memory: its inverse): median and range of the rounds, {results.date}",
        fontsize=9,
    )
    axes.xaxis.set_label_coords(1, -0.4 / (height - 0.7))
    axes.xaxis.label.set_horizontalalignment("right")
    return figure


def draw_name(axes: Axes, place: int, name: str) -> None:
    """Write the measure's name before its first peer, with a line above it."""
    axes.text(-1.05, place, name, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    line = [-1.05, 1], [place - 0.5, place - 0.5]
    axes.plot(*line, transform=axes.get_yaxis_transform(), color=GRID, linewidth=0.8, clip_on=False)


def draw_ratio(axes: Axes, place: int, values: Sequence[float]) -> None:
    """Draw a range with its median, in another color if the other program is better."""
    middle = statistics.median(values)
    ink = OURS_INK if middle >= 1 else THEIRS_INK
    axes.plot([min(values), max(values)], [place, place], color=ink, linewidth=3, alpha=0.4, solid_capstyle="round")
    axes.plot([middle], [place], "o", color=ink, markersize=5)
    text = number(middle, ".2f")
    axes.annotate(text, (max(values), place), (6, 0), textcoords="offset points", va="center", fontsize=8, bbox=PAPER)
