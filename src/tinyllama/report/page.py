"""The HTML page of a report, rendered from page.html, page.css and page.js with a run's figures, charts and tables.

The page needs no network access, and is complete without its script. The script shows values under the pointer, and
updates a live page. jinja2 escapes all text, since names in recipes and files can contain HTML. The page's policy
allows no other script.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tinyllama.errors import InputError, translate_damage_errors
from tinyllama.evaluate.results import HELLASWAG_CHANCE, Score, describe_measurement, task_score
from tinyllama.files import atomic_write
from tinyllama.formatting import MISSING, format_count, format_duration_precise, format_percent, visible
from tinyllama.hardware import format_hardware
from tinyllama.plots.charts import baseline_levels
from tinyllama.plots.curves import Curve
from tinyllama.release.card import describe_mixture_stages
from tinyllama.release.metadata import has_scores, release_score
from tinyllama.report import content, samples
from tinyllama.report.chart import NARROW, WIDE, Chart, Kind, Series, Unit
from tinyllama.report.content import DURING_TRAINING, RunData, format_median, format_newest, read_run
from tinyllama.report.marks import CATEGORIES
from tinyllama.runs.listing import RunStatus
from tinyllama.runs.log import INTERRUPTION, PROBLEM, event_category
from tinyllama.runs.samples import SAMPLE_SETTINGS

_HERE = Path(__file__).parent
SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8")
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_HASH}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'"
)
"""Content security policy of the page: no script except page.js, and no request to another machine."""
_NUM_RUN_COLORS = 6
"""Number of classes run-0, run-1, … in page.css."""
_MAX_SOURCES = 8
"""Maximum number of lines in the chart of the validations by source."""
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)

_METRIC_CHARTS: tuple[tuple[str, str, str, Unit, Kind], ...] = (
    ("validation_bits_per_byte", "Validation", "of held-out text", Unit("bits per byte"), "points"),
    ("learning_rate", "Learning rate", "schedule of the recipe", Unit("per step"), "line"),
    ("gradient_norm", "Gradient norm", "before clipping", Unit("L2 norm"), "smooth"),
    ("tokens_per_second", "Throughput", "all ranks together", Unit("tokens/s", "count"), "smooth"),
    ("mfu", "MFU", "formula below", Unit("% of the peak FLOP/s", "percent"), "smooth"),
    ("memory_bytes", "Memory", "peak so far: GPU of rank 0, or process", Unit("bytes", "bytes"), "smooth"),
)
"""Metric, title, caption, unit and kind of series of each small chart."""
_FASTEST_PRODUCT = "fastest matrix product measured"
"""Reference of the MFU on a CPU."""


@dataclass(frozen=True)
class HeadFigure:
    """A number at the top of the page."""

    label: str
    value: str
    note: str
    fraction: float | None = None
    """Length of the bar below the number, as a fraction of the full length; None for no bar."""


@dataclass(frozen=True)
class Picker:
    """Runs that a live page can show."""

    runs: Mapping[str, RunStatus]
    """Status of each run, by name."""
    selected: str
    compared: Sequence[str]
    problems: Sequence[str] = ()
    """Reasons why selected runs cannot be shown."""


def write_report(run: Path, compare: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Write the report of a run, compared with other runs; return its path, by default RUN/report.html.

    Raises InputError if one of the folders is not a run, or if a file of a run is damaged.
    """
    path = output or run / "report.html"
    if path.is_dir():
        raise InputError(f"{path}: a folder; --output takes a file, such as {path / 'report.html'}")
    with translate_damage_errors(run):
        html = render_page(read_run(run), [read_run(other) for other in compare])
    with atomic_write(path) as file:
        file.write(html.encode())
    return path


def render_page(run: RunData | None, others: Sequence[RunData] = (), picker: Picker | None = None) -> str:
    """Render a run's report as HTML, compared with `others`; with `picker`, as a live page.

    A live page without a run shows only the picker and its problems.
    """
    html = _ENVIRONMENT.get_template("page.html").render(
        run=run,
        picker=picker,
        content=content,
        categories=CATEGORIES,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(SCRIPT),
        policy=POLICY,
        samples=samples,
        sample_settings=SAMPLE_SETTINGS,
        version=version("tinyllama"),
        **(_context(run, others) if run else {}),
    )
    return visible(html)


def _context(run: RunData, others: Sequence[RunData]) -> dict[str, object]:
    runs = dict(zip(content.unique_run_names([run, *others]), [run, *others], strict=True)) if others else {}
    return {
        "runs": runs,
        "summary": _summary(run),
        "status": _status(run),
        "head_figures": _head_figures(run),
        "loss": _loss_chart(run),
        "metrics": list(_metric_charts(run)),
        "scores": _score_chart(run),
        "tasks": _task_charts(run),
        "measured_with": sorted({describe_measurement(evaluation) for _, evaluation in run.evaluations}),
        "stages": describe_mixture_stages(run.recipe),
        "comparison": _comparison_chart(runs),
        "written": content.format_timestamp(run.read_at),
    }


def _summary(run: RunData) -> str:
    shape, ranks = run.recipe.model, run.ranks
    size = f"{run.parameters:,} parameters" if run.parameters else "unknown size"
    trained = f", trained on {' and then '.join(map(str, ranks))} rank{'s' * (ranks != [1])}" if ranks else ""
    return (
        f"A Llama of {size}: {shape.layers} layers, width {shape.dim:,}, {shape.heads} heads, {shape.kv_heads} "
        f"key/value heads, context {shape.context_length:,} tokens; {run.recipe.train.precision}{trained}."
        + (f" Hardware: {'; then '.join(map(format_hardware, run.hardware))}." if run.hardware else "")
    )


def _status(run: RunData) -> str:
    left = f"about {format_duration_precise(run.state.seconds_left)} left" if run.state.seconds_left else ""
    step = f"Step {run.metrics.step:,} of {run.recipe.train.steps:,}"
    return ", ".join(part for part in (step, run.state.note, left) if part)


def _head_figures(run: RunData) -> list[HeadFigure]:
    metrics, train, figures = run.metrics, run.recipe.train, []
    if "validation_bits_per_byte" in metrics.newest:
        step, value = metrics.newest["validation_bits_per_byte"]
        note = f"{format_newest(run, 'validation_loss')} nats per token, at step {step:,}"
        figures.append(HeadFigure("validation, bits per byte", f"{value:.4f}", note))
    step, _ = metrics.newest.get("loss", (0, 0.0))
    note = f"nats per token, at step {step:,}" if step else "no step yet"
    figures.append(HeadFigure("training loss", format_newest(run, "loss"), note))
    planned = train.steps * train.batch_tokens
    done = metrics.tokens / planned
    note = f"of {format_count(planned)} planned, {format_percent(done)}"
    figures.append(HeadFigure("tokens seen", format_count(metrics.tokens), note, min(1.0, done)))
    if run.parameters:
        note = f"{metrics.tokens / run.parameters:.3g} tokens seen per parameter"
        figures.append(HeadFigure("parameters", format_count(run.parameters), note))
    else:
        figures.append(HeadFigure("parameters", MISSING, "unknown before training has started"))
    seconds = run.wall_clock_seconds
    note = f"{format_duration_precise(metrics.seconds)} of it in steps" if metrics.seconds else "no step yet"
    figures.append(HeadFigure("wall clock", format_duration_precise(seconds) if seconds else MISSING, note))
    mfu = format_median(run, "mfu", format_percent)
    note = "median"
    if mfu == MISSING:
        note += "; MFU unknown, because the peak FLOP/s of the device is unknown"
    elif run.hardware:  # before the first checkpoint it is unknown whether the peak is measured
        note += f"; {mfu} of the {_FASTEST_PRODUCT}" if _has_measured_peak(run) else f"; {mfu} MFU"
    figures.append(HeadFigure("tokens/s", format_median(run, "tokens_per_second", format_count), note))
    if scored := [row for row in run.scores["releases"] if release_score(row)]:
        note = f"{scored[-1]['coverage']}, step {scored[-1]['step']:,}"
        figures.append(HeadFigure("HellaSwag acc_norm, %", str(release_score(scored[-1])), note))
    return [*figures, _problems_figure(run)]


def _has_measured_peak(run: RunData) -> bool:
    """Return whether the MFU refers to measured matrix products, because the run trained on a CPU."""
    return any(record["type"] == "cpu" for record in run.hardware)


def _problems_figure(run: RunData) -> HeadFigure:
    categories = [event_category(event) for event in run.events]
    problems, interruptions = categories.count(PROBLEM), categories.count(INTERRUPTION)
    skipped = run.metrics.num_skipped
    skips = f"{skipped:,} step{'s' * (skipped > 1)} skipped, " if skipped else ""
    before = " before" if run.state.state in ("stopped", "failed") else ""
    stops = f"{interruptions:,} stops and resumes" if interruptions else f"never stopped{before}"
    return HeadFigure("problems", f"{problems:,}" if problems else "none", f"{skips}{stops}")


def _loss_chart(run: RunData) -> Chart | None:
    curves = run.metrics.curves
    if not len(curves["loss"]):
        return None
    caption = (
        "Cross-entropy against tokens seen. The pale line passes through the minimum and the maximum of each span of "
        "steps, so every spike is visible."
    )
    series = [Series("training", "training", curves["loss"])]
    if len(curves["validation_loss"]):
        series.append(Series("validation", "validation", curves["validation_loss"], "points"))
    return Chart(
        "loss",
        "Loss",
        caption,
        Unit("nats per token"),
        series,
        events=[event for event in run.events if event_category(event) in CATEGORIES],
        batch_tokens=run.recipe.train.batch_tokens,
        sizes=(WIDE, NARROW),
    )


def _metric_charts(run: RunData) -> Iterator[Chart]:
    for metric, title, caption, unit, kind in _METRIC_CHARTS:
        is_relative = metric == "mfu" and _has_measured_peak(run)
        shown_unit = Unit(f"% of the {_FASTEST_PRODUCT}", "percent") if is_relative else unit
        if len(curve := run.metrics.curves[metric]):
            series = [Series(title, "validation" if kind == "points" else "training", curve, kind)]
            yield Chart(metric, title, caption, shown_unit, series, batch_tokens=run.recipe.train.batch_tokens)
        if metric == "validation_bits_per_byte" and len(run.metrics.sources) > 1:
            yield _source_chart(run, unit)
        if metric == "validation_bits_per_byte" and run.metrics.positions:
            yield _position_chart(run, unit)


def _source_chart(run: RunData, unit: Unit) -> Chart:
    """Return the chart of the validations by source, of the _MAX_SOURCES sources with the largest weights."""
    weights = {name: source.weight for name, source in run.recipe.data.sources.items()}
    sources = sorted(run.metrics.sources, key=lambda name: -weights.get(name, 0))
    curves = [(name, run.metrics.curves[f"validation_bits_per_byte/{name}"]) for name in sources[:_MAX_SOURCES]]
    caption = "of held-out text" if len(curves) == len(sources) else f"{len(curves)} of {len(sources)} sources"
    return _chart_of_parts(run, "source", caption, unit, curves)


def _position_chart(run: RunData, unit: Unit) -> Chart:
    """Return the chart of the validations by position in the sequence."""
    names = run.metrics.positions
    curves = [(name, run.metrics.curves[f"validation_bits_per_byte_by_position/{name}"]) for name in names]
    return _chart_of_parts(run, "position", "range of positions in a sequence", unit, curves)


def _chart_of_parts(run: RunData, by: str, caption: str, unit: Unit, curves: Sequence[tuple[str, Curve]]) -> Chart:
    series = [Series(name, _color(number), curve, "points") for number, (name, curve) in enumerate(curves)]
    tokens = run.recipe.train.batch_tokens
    return Chart(f"validation-by-{by}", f"Validation by {by}", caption, unit, series, batch_tokens=tokens)


def _score_chart(run: RunData) -> Chart | None:
    if not has_scores(run.scores):
        return None
    caption = (
        "acc_norm against tokens seen; bars are standard errors. Baselines are horizontal lines, or arrows if they are "
        "far away, since most of them were trained on far more tokens. Published scores are on all 10,042 items."
    )
    rows = [row for row in run.scores["releases"] if row["hellaswag"] is not None]
    curve = _score_curve([(row["tokens"], row["hellaswag"], row["stderr"] or 0) for row in rows])
    series = [Series(f"{rows[-1]['name']}, ± standard error", "training", curve, "errors")]
    return Chart(
        "scores",
        "HellaSwag",
        caption,
        Unit("per cent"),
        series,
        baseline_levels(run.scores),
        HELLASWAG_CHANCE,
        sizes=(WIDE, NARROW),
    )


def _task_charts(run: RunData) -> list[Chart]:
    """Return a chart for each task and number of items that were scored at several steps.

    The scores of releases on HellaSwag are excluded, because they have a chart of their own.
    """
    found: dict[tuple[str, str], dict[int, tuple[Score, float | None]]] = {}
    for label, evaluation in run.evaluations:
        for task, row in evaluation["rows"].items():
            if (score := task_score(row)) and (task != "hellaswag" or label.startswith(DURING_TRAINING)):
                points = found.setdefault((f"{task}, {score.metric}", evaluation["coverage"][task]), {})
                points[evaluation["tokens"]] = score, row.get("chance")
    charts: list[Chart] = []
    for (title, coverage), points in found.items():
        if len(points) > 1:
            curve = _score_curve([(tokens, one.value, one.stderr or 0) for tokens, (one, _) in sorted(points.items())])
            chance = next(reversed(points.values()))[1]
            level = None if chance is None else 100 * chance
            caption = f"{coverage}, ± standard error" + ("" if level is None else f"; chance: {level:.4g} (grey)")
            series = [Series(title, "training", curve, "errors")]
            charts.append(Chart(f"task-{len(charts)}", title, caption, Unit("per cent"), series, chance=level))
    return charts


def _score_curve(points: Sequence[tuple[float, float, float]]) -> Curve:
    """Return a curve of points (tokens, score, standard error), whose range is the standard error."""
    tokens, scores, errors = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    return Curve(tokens, scores - errors, scores + errors, scores, np.ones(len(points)))


def _color(number: int) -> str:
    return f"run-{number % _NUM_RUN_COLORS}" + (" dashed" if number >= _NUM_RUN_COLORS else "")


def _comparison_chart(runs: Mapping[str, RunData]) -> Chart | None:
    series = []
    for number, (name, run) in enumerate(runs.items()):
        color = _color(number)
        if len(run.metrics.curves["loss"]):
            series.append(Series(name, color, run.metrics.curves["loss"]))
        if len(run.metrics.curves["validation_loss"]):
            validation = run.metrics.curves["validation_loss"]
            series.append(Series(f"{name}, validation", color, validation, "points", in_legend=False))
    if not series:
        return None
    caption = "Cross-entropy against tokens seen: running means, and validation as points."
    return Chart("comparison", "Loss of all runs", caption, Unit("nats per token"), series, sizes=(WIDE, NARROW))
