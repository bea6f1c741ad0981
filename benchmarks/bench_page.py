"""Writer of docs/benchmarks.md and its plot, which depend only on a results file.

The table has a row per peer. Below the table, the page explains each measure: the measured quantity, the settings, and
the limits.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from bench_plot import draw
from matplotlib.backends.backend_agg import FigureCanvasAgg
from measuring import OURS, Machine, Measure, Results, comparison, spread

from tinyllama.files import atomic_write

TITLES = {
    "tokenization": "Text to tokens",
    "deduplication": "Deduplication and decontamination",
    "cleaning": "Cleaning of web text",
    "loading": "Tokens to batches",
    "resuming": "Resuming at 90 % of an epoch",
    "training": "Training",
    "evaluation": "Evaluation",
    "starting": "Start-up",
    "quality": "Quality after equal minutes",
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
        "![Speed, memory and time of tinyllama and the other programs, one panel per question](benchmarks.png)",
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
