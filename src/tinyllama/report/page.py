"""The HTML page of a report, rendered from page.html and page.css with a run's figures, plots and tables.

The page is self-contained: it needs neither scripts nor network access. jinja2 escapes all text, since names in recipes
and files can contain HTML.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tinyllama.errors import InputError, translate_damage_errors
from tinyllama.evaluate.results import describe_measurement, task_score
from tinyllama.files import atomic_write
from tinyllama.formatting import MISSING, format_count, format_duration_precise, format_percent, visible
from tinyllama.plots import charts
from tinyllama.release.card import describe_mixture_stages
from tinyllama.release.metadata import has_scores, release_score
from tinyllama.report import content
from tinyllama.report.content import RunData, format_median, format_newest, read_run
from tinyllama.runs.log import INTERRUPTION, PROBLEM, event_category

_HERE = Path(__file__).parent
_WIDE, _NARROW, _SMALL = (860, 370), (360, 300), (340, 200)
"""Width and height of plots in CSS pixels."""

_METRIC_PLOTS = (
    ("validation_bits_per_byte", "Validation", "bits per byte of held-out text", "points", charts.VALIDATION),
    ("learning_rate", "Learning rate", "per step", "rate", charts.TRAINING),
    ("gradient_norm", "Gradient norm", "before clipping", "norm", charts.TRAINING),
    ("tokens_per_second", "Tokens/s", "all ranks together", "count", charts.TRAINING),
    ("mfu", "MFU", "fraction of the peak; formula below", "percent", charts.TRAINING),
    ("memory_bytes", "Memory", "peak so far: GPU of rank 0, or process", "bytes", charts.TRAINING),
)
"""Metric, title, caption, unit and colour of each small plot."""


@dataclass(frozen=True)
class HeadFigure:
    """A number at the top of the page."""

    label: str
    value: str
    note: str
    fraction: float | None = None
    """Length of the bar below the number, as a fraction of the full length; None for no bar."""


@dataclass(frozen=True)
class Plot:
    """One plot of a page."""

    title: str
    caption: str
    wide: Markup
    narrow: Markup | None
    """Narrow SVG for phones, with text of the same size; None if the wide SVG is narrow enough for phones."""
    legend: list[Line2D]


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


def render_page(run: RunData, others: Sequence[RunData] = ()) -> str:
    """Render a run's report as HTML, compared with `others`."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    runs = dict(zip(content.unique_run_names([run, *others]), [run, *others], strict=True)) if others else {}
    html = environment.get_template("page.html").render(
        run=run,
        runs=runs,
        content=content,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        summary=_summary(run),
        status=_status(run),
        head_figures=_head_figures(run),
        loss=_loss_plot(run),
        metrics=[
            _small_plot(metric, title, caption, partial(charts.draw_metric, curve=curve, unit=unit, color=color))
            for metric, title, caption, unit, color in _METRIC_PLOTS
            if len(curve := run.metrics.curves[metric])
        ],
        scores=_score_plot(run),
        tasks=_task_plots(run),
        measured_with=sorted({describe_measurement(evaluation) for _, evaluation in run.evaluations}),
        stages=describe_mixture_stages(run.recipe),
        comparison=_comparison_plot(runs),
        written=content.format_timestamp(run.read_at),
        version=version("tinyllama"),
    )
    return visible(html)


def _summary(run: RunData) -> str:
    shape, ranks = run.recipe.model, run.ranks
    size = f"{run.parameters:,} parameters" if run.parameters else "unknown size"
    trained = f", trained on {' and then '.join(map(str, ranks))} rank{'s' * (ranks != [1])}" if ranks else ""
    return (
        f"A Llama of {size}: {shape.layers} layers, width {shape.dim:,}, {shape.heads} heads, {shape.kv_heads} "
        f"key/value heads, context {shape.context_length:,} tokens; {run.recipe.train.precision}{trained}."
        + (f" Hardware: {run.hardware}." if run.hardware else "")
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
    note = "MFU unknown, as is the device's peak FLOP/s" if mfu == MISSING else f"{mfu} MFU; both are medians"
    figures.append(HeadFigure("tokens/s", format_median(run, "tokens_per_second", format_count), note))
    if scored := [row for row in run.scores["releases"] if release_score(row)]:
        note = f"{scored[-1]['coverage']}, step {scored[-1]['step']:,}"
        figures.append(HeadFigure("HellaSwag acc_norm, %", str(release_score(scored[-1])), note))
    return [*figures, _problems_figure(run)]


def _problems_figure(run: RunData) -> HeadFigure:
    categories = [event_category(event) for event in run.events]
    problems, interruptions = categories.count(PROBLEM), categories.count(INTERRUPTION)
    skipped = run.metrics.num_skipped
    skips = f"{skipped:,} step{'s' * (skipped > 1)} skipped, " if skipped else ""
    before = " before" if run.state.state in ("stopped", "failed") else ""
    stops = f"{interruptions:,} stops and resumes" if interruptions else f"never stopped{before}"
    return HeadFigure("problems", f"{problems:,}" if problems else "none", f"{skips}{stops}")


def _loss_plot(run: RunData) -> Plot | None:
    if not len(run.metrics.curves["loss"]):
        return None
    caption = (
        "Cross-entropy in nats per token, against tokens seen. The pale line passes through the minimum and the "
        "maximum of each span of steps, so every spike is visible."
    )

    def draw(figure: Figure, max_bins: int, max_labels: int) -> None:
        events = charts.annotations(run.events, run.recipe.train.batch_tokens, run.metrics.tokens / (8 * max_labels))
        charts.draw_loss(figure, run.metrics.curves, events, max_bins, max_labels)

    wide, narrow = partial(draw, max_bins=900, max_labels=10), partial(draw, max_bins=330, max_labels=4)
    return _large_plot("loss", "Loss", caption, wide, narrow)


def _score_plot(run: RunData) -> Plot | None:
    if not has_scores(run.scores):
        return None
    caption = (
        "acc_norm in per cent, against tokens seen; bars are standard errors. Baselines are horizontal lines, since "
        "most of them were trained on far more tokens. Published scores are on all 10,042 items."
    )
    draw = partial(charts.draw_scores, releases=run.scores)
    return _large_plot("scores", "HellaSwag", caption, draw, draw)


def _task_plots(run: RunData) -> list[Plot]:
    """Return a plot for each task, except HellaSwag, that was scored at several steps."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for _, evaluation in sorted(run.evaluations, key=lambda pair: pair[1]["step"]):
        for task, row in evaluation["rows"].items():
            if (score := task_score(row)) and task != "hellaswag":
                point = (evaluation["tokens"], score.value, score.stderr or 0)
                points.setdefault(f"{task}, {score.metric}", []).append(point)
    several = [(title, found) for title, found in points.items() if len(found) > 1]
    return [
        _small_plot(f"task-{number}", title, "per cent, ± standard error", partial(charts.draw_task, points=found))
        for number, (title, found) in enumerate(several)
    ]


def _comparison_plot(runs: dict[str, RunData]) -> Plot | None:
    curves = {name: run.metrics.curves for name, run in runs.items() if len(run.metrics.curves["loss"])}
    if not curves:
        return None
    caption = "Cross-entropy in nats per token, against tokens seen: running means, and validation as points."
    wide, narrow = (partial(charts.draw_comparison, runs=curves, max_bins=max_bins) for max_bins in (600, 240))
    return _large_plot("comparison", "Loss of all runs", caption, wide, narrow)


def _large_plot(name: str, title: str, caption: str, draw_wide: charts.Draw, draw_narrow: charts.Draw) -> Plot:
    wide, legend = charts.draw_svg(draw_wide, _WIDE, f"{name}-wide")
    narrow, _ = charts.draw_svg(draw_narrow, _NARROW, f"{name}-narrow")
    return Plot(title, caption, wide, narrow, legend)


def _small_plot(name: str, title: str, caption: str, draw: charts.Draw) -> Plot:
    svg, legend = charts.draw_svg(draw, _SMALL, name)
    return Plot(title, caption, svg, None, legend)
