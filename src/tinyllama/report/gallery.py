"""The pictures of a report, as a page holds them: SVG, key, title and what the figures in them are.

The large ones are drawn twice, for a desk or paper and for a phone, so that their text has the same size on both; the
small ones fit either.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup
from matplotlib.figure import Figure

from tinyllama.evaluate.results import task_score
from tinyllama.release.index import has_scores
from tinyllama.report.marks import marks_of
from tinyllama.report.pictures import Legend, draw_comparison, draw_loss, draw_metric, draw_scores, draw_task
from tinyllama.report.reading import Run
from tinyllama.report.svg import inline_svg

_WIDE, _NARROW, _SMALL = (860, 370), (360, 300), (340, 200)
"""Width and height in CSS pixels."""

# Metric, title, what it is, how it is drawn, colour.
_SMALL_ONES = (
    ("validation_bits_per_byte", "Validation", "bits per byte of text held out", "points", "validation"),
    ("learning_rate", "Learning rate", "at each step", "rate", "training"),
    ("gradient_norm", "Gradient norm", "before clipping", "norm", "training"),
    ("tokens_per_second", "Tokens/s", "of all ranks together", "count", "training"),
    ("mfu", "MFU", "share of the peak; formula below", "share", "training"),
    ("memory_bytes", "Memory", "most so far: of the first rank's GPU, or process", "bytes", "training"),
)


@dataclass(frozen=True)
class ReportFigure:
    """One picture of a page."""

    name: str
    """The page's for it, unique there."""
    title: str
    caption: str
    wide: Markup
    narrow: Markup | None
    """For narrow pages, instead of the wide one."""
    keys: Legend


def loss_picture(run: Run) -> ReportFigure | None:
    """Loss with validation and the marks of events; None before the first row."""
    if not len(run.metrics.curves["loss"]):
        return None
    caption = (
        "Cross-entropy in nats per token, against tokens seen. The pale line goes through the least and the greatest "
        "loss of each span of steps, so that every spike shows."
    )
    return _large("loss", "Loss", caption, partial(_draw_loss, run, 900, 10), partial(_draw_loss, run, 330, 4))


def _draw_loss(run: Run, spans: int, labels: int, figure: Figure) -> Legend:
    marks = marks_of(run.events, run.recipe.train.batch_tokens, run.metrics.tokens / (8 * labels))
    return draw_loss(figure, run.metrics.curves, marks, spans, labels)


def score_picture(run: Run) -> ReportFigure | None:
    """HellaSwag of the releases beside the baselines; None without scores."""
    if not has_scores(run.table):
        return None
    caption = (
        "acc_norm in per cent, against tokens seen; bars are standard errors. Baselines are lines, as most of them saw "
        "far more tokens; published ones were scored by others, on all 10,042 items."
    )
    draw = partial(draw_scores, releases=run.table)
    return _large("scores", "HellaSwag", caption, draw, draw)


def task_pictures(run: Run) -> list[ReportFigure]:
    """A small one for each other task that was scored at several steps."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _, scores in sorted(run.evaluations, key=lambda pair: pair[1]["step"]):
        for task, row in scores["rows"].items():
            score = task_score(row)
            if score and task != "hellaswag":
                point = (scores["tokens"], score.value, score.stderr or 0)
                found.setdefault(f"{task}, {score.metric}", []).append(point)
    return [
        _small(f"task-{number}", title, "per cent, ± standard error", partial(draw_task, points=points))
        for number, (title, points) in enumerate(found.items())
        if len(points) > 1
    ]


def comparison_picture(runs: Mapping[str, Run]) -> ReportFigure | None:
    """The loss of all runs that have any; None where none has."""
    curves = {name: run.metrics.curves for name, run in runs.items() if len(run.metrics.curves["loss"])}
    if not curves:
        return None
    caption = "Cross-entropy in nats per token, against tokens seen: running means, and validation as points."
    wide, narrow = (partial(draw_comparison, runs=curves, spans=spans) for spans in (600, 240))
    return _large("comparison", "Loss of all runs", caption, wide, narrow)


def metric_pictures(run: Run) -> list[ReportFigure]:
    """A small one for each other metric that the run has."""
    return [
        _small(
            name, title, caption, partial(draw_metric, curve=run.metrics.curves[name], unit=unit, spans=320, ink=ink)
        )
        for name, title, caption, unit, ink in _SMALL_ONES
        if len(run.metrics.curves[name])
    ]


Draw = Callable[[Figure], Legend]


def _large(name: str, title: str, caption: str, draw_wide: Draw, draw_narrow: Draw) -> ReportFigure:
    wide, keys = inline_svg(draw_wide, _WIDE, f"{name}-wide", f"{title}: {caption}")
    narrow, _ = inline_svg(draw_narrow, _NARROW, f"{name}-narrow", f"{title}: {caption}")
    return ReportFigure(name, title, caption, wide, narrow, keys)


def _small(name: str, title: str, caption: str, draw: Draw) -> ReportFigure:
    svg, keys = inline_svg(draw, _SMALL, name, f"{title}, {caption}")
    return ReportFigure(name, title, caption, svg, None, keys)
