"""Runs beside each other: what their recipes do differently, and what came of it.

Pure functions of what was read of each; the loss of all of them in one picture is the pictures' part.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

from tinyllama.formatting import MISSING, format_count, format_duration_precise, format_percent
from tinyllama.recipe import flatten
from tinyllama.release.index import release_score
from tinyllama.report.reading import Run
from tinyllama.report.tables import Table, differing, wall_clock


def unique_run_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run, no two the same: its folder's, or where others are called so too, its path."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{run.folder} ({number})" if _is_twice(run, runs) else str(run.folder)
        for number, (name, run) in enumerate(zip(names, runs, strict=True), 1)
    ]


def _is_twice(run: Run, runs: Sequence[Run]) -> bool:
    return [other.folder for other in runs].count(run.folder) > 1


def recipe_differences(runs: Mapping[str, Run]) -> Table:
    """Each field of the recipe that is not the same in all runs; a run's name is none of them."""
    fields = {name: flatten(run.recipe.model_dump(mode="json", exclude={"name"})) for name, run in runs.items()}
    rows = [(name, *(_value(of_run.get(name, "")) for of_run in fields.values())) for name in differing(fields)]
    return Table(("field of the recipe", *runs), rows)


def _value(value: object) -> str:
    return MISSING if value is None else str(value)


def results(runs: Mapping[str, Run]) -> Table:
    """What came of each run, one a column."""
    columns = [_result(run) for run in runs.values()]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return Table(("", *runs), rows, numbers=tuple(range(1, len(columns) + 1)))


def _result(run: Run) -> dict[str, str]:
    metrics, seconds = run.metrics, wall_clock(run)
    scored = [row for row in run.table["releases"] if row["hellaswag"] is not None]
    return {
        "state": run.state.state,
        "parameters": f"{run.parameters:,}" if run.parameters else MISSING,
        "tokens seen": format_count(metrics.tokens),
        "training loss, last step (nats per token)": newest(run, "loss"),
        "validation loss (nats per token)": newest(run, "validation_loss"),
        "validation (bits per byte)": newest(run, "validation_bits_per_byte"),
        "tokens/s, median": median_of(run, "tokens_per_second", format_count),
        "MFU, median": median_of(run, "mfu", format_percent),
        "time in steps": format_duration_precise(metrics.seconds) if metrics.seconds else MISSING,
        "wall clock": format_duration_precise(seconds) if seconds else MISSING,
        "steps skipped": f"{metrics.num_skipped:,}",
        "HellaSwag acc_norm (per cent)": str(release_score(scored[-1])) if scored else MISSING,
    }


def newest(run: Run, name: str) -> str:
    """The newest value of a metric, to four places."""
    return f"{run.metrics.newest[name][1]:.4f}" if name in run.metrics.newest else MISSING


def median_of(run: Run, name: str, say: Callable[[float], str]) -> str:
    """The median of a metric over the run."""
    curve = run.metrics.curves[name]
    return say(statistics.median(curve.mean.tolist())) if len(curve) else MISSING
