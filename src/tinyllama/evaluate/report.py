"""What `tinyllama evaluate` does with scores: keeps them beside the model and shows them beside the baselines."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tinyllama.evaluate.baselines import PUBLISHED
from tinyllama.evaluate.scores import BATCH_SIZE, Evaluation, evaluate
from tinyllama.files import read_json
from tinyllama.formatting import format_count, format_table
from tinyllama.hardware import tune_malloc
from tinyllama.loading import resolve_model
from tinyllama.release import update_card
from tinyllama.train.distributed import broadcast_from_rank0, init_distributed

_PATIENCE_SECONDS = 3 * 3600.0
"""Ranks wait for each other only at the end of their shares, which on unequal machines may be far apart."""


def evaluate_and_save(
    source: str,
    tasks: Sequence[str],
    limit: int | None,
    precision: torch.dtype,
    num_fewshot: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> str:
    """Score a model, write evaluation.json beside it (and a release's card anew), and return a table for reading.

    A hub model's is written to `evaluations/ORG--NAME.json` in the working directory. Under torchrun all ranks score;
    the first alone writes and returns the table, the others return an empty text.
    """
    tune_malloc()
    with init_distributed(_PATIENCE_SECONDS) as ranks:
        folder = broadcast_from_rank0(resolve_model(source).folder, ranks)
        scores = evaluate(
            folder,
            tasks,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            precision=precision,
            ranks=ranks,
        )
    return _saved(replace(scores, model=source), folder) if ranks.is_main else ""


def _saved(evaluation: Evaluation, folder: Path) -> str:
    """Keep scores of the model in a folder, and return what there is to read."""
    source = evaluation.model
    path = _place(source, folder)
    _merge_previous(evaluation, path).save(path)
    if path.with_name("release.json").is_file():
        update_card(path.parent)
    return "\n".join([*table(evaluation), f"saved: {path}"])


def _place(source: str, folder: Path) -> Path:
    """Where the scores of a model go; not into the hub's cache, which is the hub's."""
    if not Path(source).exists():
        return Path("evaluations", f"{source.replace('/', '--')}.json")
    is_release = (folder.parent / "release.json").is_file()
    return (folder.parent if is_release else folder) / "evaluation.json"


def _merge_previous(evaluation: Evaluation, path: Path) -> Evaluation:
    """The scores beside those that the same weights already have, from the same software, for other tasks."""
    earlier = read_json(path) if path.is_file() else {}
    same = ("step", "precision", "versions")
    if evaluation.step is None or any(earlier.get(name) != getattr(evaluation, name) for name in same):
        return evaluation  # without a step nothing says that the weights are the same
    fuller = {task for task, row in earlier["rows"].items() if _covers_more_items(earlier, task, row, evaluation)}
    merged = {
        name: earlier.get(name, {})
        | {task: value for task, value in getattr(evaluation, name).items() if task not in fuller}
        for name in ("rows", "coverage", "data", "num_fewshot")
    }
    shortened = {task: count for task, count in earlier.get("shortened", {}).items() if task not in evaluation.rows}
    asked = list(dict.fromkeys([*earlier.get("asked", []), *evaluation.asked]))
    return replace(evaluation, **merged, shortened=shortened | evaluation.shortened, asked=asked)


def _covers_more_items(earlier: dict[str, Any], task: str, row: dict[str, float], evaluation: Evaluation) -> bool:
    """Whether earlier scores are of more items than the new ones, with as many examples: they took longer, and stay."""
    new = evaluation.rows.get(task)
    shots = (earlier.get("num_fewshot", {}).get(task), evaluation.num_fewshot.get(task))
    return new is not None and row["items"] > new["items"] and shots[0] == shots[1]


_COLUMNS = {"acc": (100, ".2f"), "acc_norm": (100, ".2f"), "bits_per_byte": (1, ".4f")}
"""Metrics that have a column of their own: unit and form."""


def table(evaluation: Evaluation) -> Iterator[str]:
    """Each task's scores in points with their standard errors, and HellaSwag's published ones below."""
    head = ("task", "acc", "acc_norm", "bits per byte", "scored on")
    yield from format_table(head, [_cells(evaluation, task) for task in evaluation.rows])
    yield from _other_metrics(evaluation)
    for task, count in evaluation.shortened.items():
        yield f"{task}: {count} requests lost their beginning, for they are longer than the model's context"
    if "hellaswag" in evaluation.rows:
        rows = (f"{row.name} ({format_count(row.tokens)} tokens) {row.hellaswag_acc_norm:.2f}" for row in PUBLISHED)
        yield f"published HellaSwag acc_norm (all items): {', '.join(rows)}"


def _cells(evaluation: Evaluation, task: str) -> tuple[str, ...]:
    row, shots = evaluation.rows[task], evaluation.num_fewshot.get(task, 0)
    examples = f", {shots} examples before each" if shots else ""
    scored_on = f"{evaluation.coverage[task]} ({evaluation.data[task]}){examples}"
    scores = (_with_error(row, metric, unit, form) for metric, (unit, form) in _COLUMNS.items())
    return (task, *scores, scored_on)


def _other_metrics(evaluation: Evaluation) -> Iterator[str]:
    """A line for each task that has other metrics, such as LAMBADA's perplexity; as shares of 1 where they are such."""
    for task, row in evaluation.rows.items():
        names = [name for name in row if not name.endswith(("items", "_stderr")) and name not in _COLUMNS]
        if names:
            yield f"{task}: " + ", ".join(f"{name} {_with_error(row, name, 1, '.4g')}" for name in names)


def _with_error(row: dict[str, float], metric: str, unit: float, form: str) -> str:
    """A score and its standard error; a dash where the task has none."""
    if metric not in row:
        return "-"
    error = row.get(f"{metric}_stderr")
    return f"{unit * row[metric]:{form}}" + ("" if error is None else f" ± {unit * error:{form}}")
