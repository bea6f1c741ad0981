"""A results file as docs/benchmarks.md and its plot: pure functions of the measures, so that both can be made anew.

The table has a row a peer; below it stands, for each measure, what was measured, in which settings, and what it says
nothing of. The plot is of the ratios, on a logarithmic axis: twice as fast and half as fast are as far from the line.
"""

import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import OURS, Machine, Measure, Program, Results, better, number, ratios, spread

from tinyllama.files import write_atomically

OURS_INK, EVEN_INK, GRID = "#2a6fbb", "#7a828e", "#e6e6e6"
TITLES = {
    "tokenising": "Text to tokens",
    "loading": "Tokens to batches",
    "resuming": "Going on at 90 % of an epoch",
    "training": "Training",
    "evaluation": "Scoring",
    "starting": "Starting",
}


def write_page(results: Results, folder: Path) -> None:
    """benchmarks.md and benchmarks.png."""
    with write_atomically(folder / "benchmarks.png") as file:
        FigureCanvasAgg(draw(results)).print_png(file)
    with write_atomically(folder / "benchmarks.md") as file:
        file.write(("\n".join(page(results)) + "\n").encode())


def page(results: Results) -> Iterator[str]:
    """The page's lines."""
    yield from (
        "# Benchmarks",
        "",
        "<!-- Written by `make bench`; benchmarks/bench.py --page docs/benchmarks.json makes it anew. -->",
        "",
        "What this project takes beside the programs that do the same, each through its own documented interface and",
        "in the settings in which it was quickest here. Programs take turns, so that a busy machine slows all alike; a",
        "ratio is of two turns of one round, and stands as the median of the rounds with the least and the greatest.",
        "Above 1 we are better.",
        "",
        "![How many times as fast as each peer, on a logarithmic axis](benchmarks.png)",
        "",
        *machine_lines(results),
        "",
    )
    for section, own in groupby(results.measures, key=lambda measure: measure.section):
        yield from section_lines(TITLES[section], list(own))
    yield from version_lines(results)


def machine_lines(results: Results) -> Iterator[str]:
    """Where and when it was measured."""
    machine = results.machine
    yield from (
        "| | |",
        "|---|---|",
        f"| date | {results.date}, {results.seconds / 60:.0f} minutes in one run (`make bench`) |",
        f"| machine | {machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB; {machine.system} |",
        f"| its bf16 2048^3 product, all cores | {dashed(spread(machine.product_gflops, ',.0f'))} GFLOP/s, before each "
        "section and after the last |",
        f"| load before the first section | {machine.load[0]:.1f}{busy(machine)} |",
        f"| Python, torch | {machine.python}, {machine.torch} |",
    )


def busy(machine: Machine) -> str:
    """A warning where other jobs ran."""
    return " (**other jobs ran**: ratios hold better than rates)" if machine.load[0] > machine.cores / 4 else ""


def section_lines(title: str, measures: Sequence[Measure]) -> Iterator[str]:
    """A section: its table, then what each row means."""
    yield from (f"## {title}", "", "| | program | | times as good |", "|---|---|---|---|")
    for measure in measures:
        for name, program in measure.programs.items():
            label = measure.name if name == OURS else ""
            rate = f"{dashed(spread(program.values))} {measure.unit}"
            ratio = "" if name == OURS else f"{dashed(spread(ratios(measure, name), '.2f'))} as {better(measure)}"
            yield f"| {label} | {name} | {rate} | {ratio} |"
    yield ""
    for measure in measures:
        rounds = len(measure.programs[OURS].values)
        yield f"**{measure.name}** ({rounds} rounds). {measure.how}"
        yield ""
        yield from settings_lines(measure)
        yield f"- Not shown: {measure.not_shown}"
        yield ""


def settings_lines(measure: Measure) -> Iterator[str]:
    """A program a line: its settings, and what was checked."""
    for name, program in measure.programs.items():
        yield f"- {name}: {program.settings}" + (f". Checked: {program.found}" if program.found else "")


def version_lines(results: Results) -> Iterator[str]:
    """Every program's version, once."""
    versions = {name: program.version for measure in results.measures for name, program in measure.programs.items()}
    yield from ("## Versions", "", "| program | version |", "|---|---|")
    yield from (f"| {name} | {version} |" for name, version in sorted(versions.items()))


def dashed(words: str) -> str:
    """With the dash of a range."""
    return words.replace("-", "\N{EN DASH}")


def draw(results: Results) -> Figure:
    """A line a measure and peer: the median of the rounds' ratios, and their range."""
    rows = [
        (measure, peer, program)
        for measure in results.measures
        for peer, program in measure.programs.items()
        if peer != OURS
    ]
    figure = Figure(figsize=(9, 1.1 + 0.3 * len(rows)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for place, (measure, peer, _) in enumerate(rows):
        draw_ratio(axes, place, ratios(measure, peer))
    axes.set_yticks(range(len(rows)), labels(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}\N{MULTIPLICATION SIGN}")
    axes.axvline(1, color=EVEN_INK, linewidth=1)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_xlabel(
        f"times as fast (or as small) as the peer; median, least and greatest of the rounds, {results.date}"
    )
    return figure


def labels(rows: Sequence[tuple[Measure, str, Program]]) -> list[str]:
    """A measure's name beside its first peer, and each peer."""
    found, last = [], ""
    for measure, peer, _ in rows:
        found.append(f"{measure.name}, beside {peer}" if measure.name != last else f"beside {peer}")
        last = measure.name
    return found


def draw_ratio(axes: Axes, place: int, values: Sequence[float]) -> None:
    """A range with its median."""
    middle = statistics.median(values)
    axes.plot([min(values), max(values)], [place, place], color=OURS_INK, linewidth=2.5, alpha=0.45)
    axes.plot([middle], [place], "o", color=OURS_INK, markersize=5)
    axes.annotate(
        number(middle, ".2f"), (max(values), place), (6, 0), textcoords="offset points", va="center", fontsize=8
    )
