"""The page: what was read of a run, put in the order in which a reader asks for it, and into page.html.

First what it is and how it stands, then how well it learnt, then what it was made of; page.css has the looks, also on
paper. Every text goes through jinja2's escaping, since names come from recipes and files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tinyllama.evaluate.results import describe_measurement
from tinyllama.formatting import MISSING, format_count, format_duration_precise, format_percent, visible
from tinyllama.release.card_data import mix_stages
from tinyllama.release.index import release_score
from tinyllama.report import tables
from tinyllama.report.comparison import median_of, newest, recipe_differences, results, unique_run_names
from tinyllama.report.gallery import comparison_picture, loss_picture, metric_pictures, score_picture, task_pictures
from tinyllama.report.pictures import PALETTE
from tinyllama.report.reading import Run
from tinyllama.runs.events import INTERRUPTION, PROBLEM, event_category

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Figure:
    """One figure of the head."""

    label: str
    value: str
    note: str
    share: float | None = None
    """Drawn as a bar."""


def page(run: Run, others: Sequence[Run] = ()) -> str:
    """A run's report as HTML, with `others` beside it."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    everyone = dict(zip(unique_run_names([run, *others]), [run, *others], strict=True))
    html = environment.get_template("page.html").render(
        run=run,
        tables=tables,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        inks=PALETTE,
        what=_what_it_is(run),
        stands=_status_line(run),
        figures=_figures(run),
        loss=loss_picture(run),
        score_picture=score_picture(run),
        tasks=task_pictures(run),
        how_measured=sorted({describe_measurement(scores) for _, scores in run.evaluations}),
        metrics=metric_pictures(run),
        stages=mix_stages(run.recipe),
        comparison=comparison_picture(everyone) if others else None,
        differences=recipe_differences(everyone) if others else None,
        results=results(everyone) if others else None,
        written=tables.format_timestamp(run.read_at),
        version=version("tinyllama"),
    )
    return visible(html)


def _what_it_is(run: Run) -> str:
    shape, ranks = run.recipe.model, run.ranks
    size = f"{run.parameters:,} parameters" if run.parameters else "a size not known yet"
    on = f", trained on {' and then '.join(map(str, ranks))} rank{'s' * (ranks != [1])}" if ranks else ""
    return (
        f"A Llama of {size}: {shape.layers} layers, width {shape.dim:,}, {shape.heads} heads, {shape.kv_heads} "
        f"key/value heads, context {shape.context_length:,} tokens; {run.recipe.train.precision}{on}."
        + (f" Hardware: {run.hardware}." if run.hardware else "")
    )


def _status_line(run: Run) -> str:
    state = run.state
    left = f"about {format_duration_precise(state.seconds_left)} left" if state.seconds_left else ""
    step = f"step {run.metrics.step:,} of {run.recipe.train.steps:,}"
    return ", ".join(part for part in (step, state.note, left) if part)


def _figures(run: Run) -> list[Figure]:
    found = [_validation(run), _loss(run), _tokens(run), _parameters(run), _time(run), _speed(run), _score(run)]
    return [figure for figure in [*found, _problems_figure(run)] if figure]


def _validation(run: Run) -> Figure | None:
    if "validation_bits_per_byte" not in run.metrics.newest:
        return None
    step, value = run.metrics.newest["validation_bits_per_byte"]
    loss = newest(run, "validation_loss")
    return Figure("validation, bits per byte", f"{value:.4f}", f"{loss} nats per token, at step {step:,}")


def _loss(run: Run) -> Figure:
    step, _ = run.metrics.newest.get("loss", (0, 0.0))
    note = f"nats per token, at step {step:,}" if step else "no step yet"
    return Figure("training loss", newest(run, "loss"), note)


def _tokens(run: Run) -> Figure:
    train, tokens = run.recipe.train, run.metrics.tokens
    planned = train.steps * train.batch_tokens
    note = f"of {format_count(planned)} planned, {format_percent(tokens / planned)}"
    return Figure("tokens seen", format_count(tokens), note, min(1.0, tokens / planned))


def _parameters(run: Run) -> Figure:
    if not run.parameters:
        return Figure("parameters", MISSING, "known once training has begun")
    each = f"{run.metrics.tokens / run.parameters:.3g} tokens seen for each"
    return Figure("parameters", format_count(run.parameters), each)


def _time(run: Run) -> Figure:
    seconds = tables.wall_clock(run)
    note = f"{format_duration_precise(run.metrics.seconds)} of it in steps" if run.metrics.seconds else "no step yet"
    return Figure("wall clock", format_duration_precise(seconds) if seconds else MISSING, note)


def _speed(run: Run) -> Figure:
    mfu = median_of(run, "mfu", format_percent)
    note = "MFU not known: no peak for this device" if mfu == MISSING else f"{mfu} MFU; both are medians"
    return Figure("tokens/s", median_of(run, "tokens_per_second", format_count), note)


def _score(run: Run) -> Figure | None:
    scored = [row for row in run.table["releases"] if row["hellaswag"] is not None]
    if not scored:
        return None
    return Figure(
        "HellaSwag acc_norm, %",
        str(release_score(scored[-1])),
        f"{scored[-1]['coverage']}, step {scored[-1]['step']:,}",
    )


def _problems_figure(run: Run) -> Figure:
    kinds = [event_category(event) for event in run.events]
    trouble, pauses = kinds.count(PROBLEM), kinds.count(INTERRUPTION)
    skipped = run.metrics.num_skipped
    left_out = f"{skipped:,} step{'s' * (skipped > 1)} skipped, " if skipped else ""
    before = " before" if run.state.state in ("stopped", "failed") else ""
    stops = f"{pauses:,} stops and resumes" if pauses else f"never stopped{before}"
    return Figure("incidents", f"{trouble:,}" if trouble else "none", f"{left_out}{stops}")
