"""The table of a run's releases beside the baselines: the contents of releases.json, and of a table in every card.

A pure function of what lies in `RUN/releases/`: each release's release.json and evaluation.json, and the baselines that
were scored here (`baselines/*.json`). So it can be made again at any time, and nothing in it is typed.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinyllama.evaluate.results import PUBLISHED_BASELINES, Score, task_score
from tinyllama.files import read_json, sha256_of
from tinyllama.recipe import Recipe
from tinyllama.runs.checkpoint import COMMIT

SEVEN_TASKS = ("hellaswag", "openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq", "piqa")
"""The model card's."""

ReleaseRow = dict[str, Any]


def releases_table(releases: Path) -> dict[str, list[ReleaseRow]]:
    """`releases`, in the order of their tokens, and `baselines`: those measured here, then the published ones.

    Each row has `name`, `tokens`, `hellaswag` (acc_norm) and `mean_of_seven` in points, `stderr` and `coverage` of the
    first where it was measured, `source` (`measured` or `published, …`); a release also `date`, `step`, `folder`,
    `commit` (SHA-256 of its checkpoint's) and `complete`: whether it and the recipe's baselines have all the scores
    that the recipe asks for.
    """
    found = [(path.parent, read_json(path)) for path in sorted(releases.glob("[!.]*/release.json"))]
    rows = [_release_row(folder, facts) for folder, facts in found if facts["step"] is not None]
    measured = [_measured(read_json(path)) for path in sorted(releases.glob("baselines/*.json"))]
    return {"releases": sorted(rows, key=lambda row: row["tokens"]), "baselines": [*measured, *_published()]}


def release_score(row: Mapping[str, Any]) -> Score | None:
    """Return the HellaSwag score in a row of `releases_table`, or None where there is none."""
    return None if row["hellaswag"] is None else Score("acc_norm", row["hellaswag"], row["stderr"])


def has_scores(releases: Mapping[str, list[ReleaseRow]]) -> bool:
    """Whether any release of a table has been scored on HellaSwag."""
    return any(row["hellaswag"] is not None for row in releases["releases"])


def _release_row(folder: Path, facts: Mapping[str, Any]) -> ReleaseRow:
    """A release's row, without scores where it has none of these weights."""
    evaluation = evaluation_of(folder)
    row = {key: facts[key] for key in ("date", "name", "step", "tokens")}
    wanted = _current_release_config(folder, facts)
    scored = (baseline_scores(folder.parent, name) for name in wanted["baselines"])
    complete = all(is_scored(scores, wanted) for scores in (evaluation, *scored))
    *_, commit = facts["checkpoints"].values()  # its own is the newest of those that were averaged
    return row | {"folder": folder.name, "commit": commit, "complete": complete, **_scores(evaluation)}


def _current_release_config(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The `release` of the run's recipe as it is now, or in a folder taken out of its run, as it was."""
    now = folder.resolve().parent.parent / "recipe.yaml"
    wanted: dict[str, Any] = facts["recipe"]["fields"]["release"]
    return Recipe.load(now).release.model_dump(mode="json") if now.is_file() else wanted


def is_release_of(folder: Path, checkpoint: Path) -> bool:
    """Whether a release is there and is this checkpoint's: a run that began anew may have left another's."""
    if not (folder / "release.json").is_file():
        return False
    commits: dict[str, str] = read_json(folder / "release.json")["checkpoints"]
    return commits.get(checkpoint.name) == sha256_of(checkpoint / COMMIT)


def is_scored(evaluation: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    """Whether an evaluation has all the tasks of a recipe's `release`, and at least as many of their items."""
    rows, asked = (_without_examples(evaluation), evaluation.get("asked", [])) if evaluation else ({}, [])
    few = {name for name, row in rows.items() if row["items"] < min(wanted["limit"] or math.inf, row["total_items"])}
    return set(wanted["tasks"]) <= {*rows, *asked} - few


def baseline_file(releases: Path, name: str) -> Path:
    """Where the scores of a baseline lie, which was named by its folder or its name on the hub."""
    return releases / "baselines" / f"{name.strip('/').replace('/', '--')}.json"


def baseline_scores(releases: Path, name: str) -> dict[str, Any] | None:
    """A baseline's evaluation, if it is there."""
    path = baseline_file(releases, name)
    return read_json(path) if path.is_file() else None


def evaluation_of(folder: Path) -> dict[str, Any] | None:
    """A release's evaluation.json; None where there is none, or one of another step."""
    path = folder / "evaluation.json"
    evaluation: dict[str, Any] | None = read_json(path) if path.is_file() else None
    return evaluation if evaluation and evaluation["step"] == read_json(folder / "release.json")["step"] else None


def mean_of_seven(rows: Mapping[str, Mapping[str, float]]) -> float | None:
    """Points, over the model card's seven tasks, acc_norm where a task has it; None unless all were scored."""
    if not all(task in rows for task in SEVEN_TASKS):
        return None
    scores = [score.value for task in SEVEN_TASKS if (score := task_score(rows[task]))]
    return sum(scores) / len(scores)


def _without_examples(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The rows that were scored as the published ones were: no solved examples before an item."""
    shots = evaluation.get("num_fewshot", {})
    return {task: row for task, row in evaluation["rows"].items() if not shots.get(task)}


def _measured(evaluation: Mapping[str, Any]) -> ReleaseRow:
    return {"name": evaluation["model"], "tokens": evaluation["tokens"], **_scores(evaluation)}


def _scores(evaluation: Mapping[str, Any] | None) -> ReleaseRow:
    rows = _without_examples(evaluation) if evaluation else {}
    hellaswag = rows.get("hellaswag", {})
    score = task_score(hellaswag, "acc_norm")
    return {
        "hellaswag": None if score is None else score.value,
        "stderr": None if score is None else score.stderr,
        "coverage": evaluation["coverage"].get("hellaswag") if evaluation else None,
        "mean_of_seven": mean_of_seven(rows),
        "source": "measured" if hellaswag else None,
    }


def _published() -> Iterator[ReleaseRow]:
    for row in PUBLISHED_BASELINES:
        yield {
            "name": row.name,
            "tokens": row.tokens,
            "hellaswag": row.hellaswag_acc_norm,
            "stderr": None,
            "coverage": "all 10042 items",
            "mean_of_seven": row.mean_of_seven,
            "source": f"published, {row.source}",
        }
