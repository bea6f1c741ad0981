"""A card's scores: this release's by task, and all of its run's beside the baselines.

Published scores are marked as such; what was measured here never stands without its error and the items it is of.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult

from tinyllama.evaluate.results import SCORE_COLUMNS, describe_measurement, score_rows
from tinyllama.formatting import format_count
from tinyllama.release.index import has_scores, release_score
from tinyllama.release.markdown import table

Facts = Mapping[str, Any]

RELEASE_HEAD = ("model", "date", "tokens", "HellaSwag acc_norm", "mean of 7 tasks", "source")

# lm-eval's task -> its data set on the hub and the split that is scored, for the metadata.
_DATA = {
    "hellaswag": ("Rowan/hellaswag", "validation"),
    "openbookqa": ("allenai/openbookqa", "test"),
    "winogrande": ("allenai/winogrande", "validation"),
    "arc_challenge": ("allenai/ai2_arc", "test"),
    "arc_easy": ("allenai/ai2_arc", "test"),
    "boolq": ("google/boolq", "validation"),
    "piqa": ("ybisk/piqa", "validation"),
    "lambada_openai": ("EleutherAI/lambada_openai", "test"),
}


def scores_section(facts: Facts, evaluation: Facts | None, releases: Facts) -> str:
    """This release's scores by task, and the table of releases where any has scores."""
    own = by_task(evaluation) if evaluation else _how_to_score(facts)
    if not has_scores(releases):
        return own
    plot = "![HellaSwag acc_norm against tokens seen, beside the baselines](scores.png)"
    beside = "This run's releases beside what others have published, on all of HellaSwag's 10,042 items:"
    return "\n\n".join([own, beside, _releases(facts, releases), plot])


def eval_results(evaluation: Facts) -> list[EvalResult]:
    """The scores as the hub's metadata has them (model-index), in per cent."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_name=f"{task} ({evaluation['coverage'][task]})",
            dataset_type=_DATA.get(task, (task, None))[0],
            dataset_split=_DATA.get(task, (task, None))[1],
            metric_type=metric,
            metric_value=round(100 * row[metric], 2),
            metric_args=_metric_args(evaluation, task, row.get(f"{metric}_stderr")),
        )
        for task, row in evaluation["rows"].items()
        for metric in ("acc", "acc_norm")
        if metric in row
    ]


def _metric_args(evaluation: Facts, task: str, error: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {} if error is None else {"stderr": round(100 * error, 2)}
    return found | {"num_fewshot": evaluation.get("num_fewshot", {}).get(task) or 0}


def _how_to_score(facts: Facts) -> str:
    release = f"runs/{facts['name']}/releases/step-{facts['step']:08d}"
    return f"Not scored yet. `tinyllama evaluate {release}` scores it."


def by_task(evaluation: Facts) -> str:
    """What was measured, a row a task, in Markdown."""
    return f"{describe_measurement(evaluation)}:\n\n{table(SCORE_COLUMNS, score_rows(evaluation))}"


def _releases(facts: Facts, releases: Facts) -> str:
    rows = [
        tuple(f"**{cell}**" if row.get("step") == facts["step"] and cell else cell for cell in cells)
        for row, cells in release_rows(releases)
    ]
    return table(RELEASE_HEAD, rows)


def release_rows(releases: Facts) -> Iterator[tuple[Facts, tuple[str, ...]]]:
    """Each release and baseline of `releases_table`'s, with RELEASE_HEAD's cells."""
    for row in releases["releases"]:
        yield row, (f"{row['name']}, step {row['step']:,}", row["date"], *_cells(row))
    for row in releases["baselines"]:
        yield row, (row["name"], "", *_cells(row))


def _cells(row: Facts) -> tuple[str, ...]:
    """Tokens, HellaSwag, mean of seven, source."""
    score = release_score(row)
    source = row["source"] or ""
    if source == "measured":
        source += f", {row['coverage']}" if row["coverage"] else ""
    return (
        "" if row["tokens"] is None else format_count(row["tokens"]),
        "" if score is None else str(score),
        "" if row["mean_of_seven"] is None else f"{row['mean_of_seven']:.2f}",
        source,
    )
