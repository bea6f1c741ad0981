"""What `tinyllama evaluate` does with scores: keeps them beside the model and shows them beside the baselines."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tinyllama.evaluate.baselines import PUBLISHED
from tinyllama.evaluate.scores import Evaluation, evaluate
from tinyllama.files import read_json
from tinyllama.model.loading import locate
from tinyllama.release import update_card


def evaluate_and_save(source: str, tasks: Sequence[str], limit: int | None, precision: torch.dtype) -> str:
    """Score a model, write evaluation.json beside it (and a release's card anew), and return a table for reading."""
    evaluation = evaluate(source, tasks, limit=limit, precision=precision)
    folder = locate(source).folder
    is_release = (folder.parent / "release.json").is_file()
    path = (folder.parent if is_release else folder) / "evaluation.json"
    _with_earlier(evaluation, path).save(path)
    if is_release:
        update_card(folder.parent)
    return "\n".join([*table(evaluation), f"saved: {path}"])


def _with_earlier(evaluation: Evaluation, path: Path) -> Evaluation:
    """The scores beside those that the same weights already have for other tasks."""
    earlier = read_json(path) if path.is_file() else {}
    if (earlier.get("step"), earlier.get("precision")) != (evaluation.step, evaluation.precision):
        return evaluation
    return replace(
        evaluation,
        rows=earlier["rows"] | evaluation.rows,
        coverage=earlier["coverage"] | evaluation.coverage,
        data=earlier["data"] | evaluation.data,
    )


def table(evaluation: Evaluation) -> Iterator[str]:
    """Each task's scores in points with their standard errors, and HellaSwag's published ones below."""
    for task, row in evaluation.rows.items():
        scores = [
            f"{metric} {100 * row[metric]:.2f} ± {100 * row[f'{metric}_stderr']:.2f}"
            for metric in ("acc", "acc_norm")
            if metric in row
        ]
        yield f"{task}: {', '.join(scores)} ({evaluation.coverage[task]})"
    if "hellaswag" in evaluation.rows:
        rows = ", ".join(f"{row.name} {row.hellaswag_acc_norm:.2f}" for row in PUBLISHED)
        yield f"published HellaSwag acc_norm (all items): {rows}"
