"""What is new in a run's files: whole lines of metrics.jsonl and events.jsonl, and the scores of its releases.

Reads only, and without torch: a tracker's process should start in a second. A file of metrics is cut back when a run
goes on, so a place in it is good only until then; the file of events only grows.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tinyllama.errors import InputError
from tinyllama.evaluate.results import PUBLISHED_BASELINES, task_score
from tinyllama.files import read_json
from tinyllama.recipe import Recipe

Row = dict[str, Any]
Scores = dict[str, float]
"""Metric -> points, such as `scores/hellaswag acc_norm` -> 45.7."""

_HELLASWAG = "scores/hellaswag acc_norm"
"""What is published of the baselines."""
_CHUNK_BYTES = 1 << 22
"""Read at a time, so that a follower of a run of months stays small: some 20,000 rows."""
FULL_RESOLUTION_STEPS = 10_000
"""Every step is shown up to this one; then every second up to its double, every fourth up to four times it, and so on:
5,000 rows a doubling, 46,000 for 1.4 million steps."""


def read_new_rows(path: Path, offset: int) -> tuple[list[Row], int]:
    """The whole lines from byte `offset` on, some megabytes of them at most, and the offset after them.

    Raises InputError with the line's number for one that is no row with a step.
    """
    if not path.is_file():
        return [], offset
    with path.open("rb") as file:
        if offset > os.fstat(file.fileno()).st_size:  # cut back since
            offset = 0
        file.seek(offset)
        data = file.read(_CHUNK_BYTES)
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines()):
        try:
            rows.append(orjson.loads(line))
            rows[-1]["step"]
        except (ValueError, KeyError, TypeError):
            before = path.read_bytes()[:offset].count(b"\n")
            words = "not a row of JSON with a step; correct or delete the line"
            raise InputError(f"{path}:{before + number + 1}: {words}") from None
    return rows, offset + len(whole)


def is_shown(row: Row) -> bool:
    """Whether a row of metrics goes to the trackers: see ALL_STEPS; a validation or a skipped step always does."""
    step = row["step"]
    stride = 1 << max(0, (step - 1) // FULL_RESOLUTION_STEPS).bit_length()
    return step % stride == 0 or "validation_loss" in row or "skipped" in row


def numeric_metrics(row: Row) -> dict[str, float]:
    """The metrics of a row: what is a number, but its step; memory in gigabytes, which axes have room for."""
    found = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
    if "memory_bytes" in found:
        found["memory_gigabytes"] = found.pop("memory_bytes") / 1e9
    return found


def timestamp_anchor(event: Row) -> tuple[int, float] | None:
    """After which step, and when, the run stood as an event says: where it began, went on or began to save."""
    if event["event"] in ("start", "resume", "checkpoint"):
        return event["step"], event["time"] - event.get("seconds", 0.0)
    return None


def time_of(run: Path, step: int) -> float:
    """When a step was made, seconds since 1970, as far as the events tell; 0 where they do not."""
    offset, found = 0, {0: 0.0}
    while (read := read_new_rows(run / "events.jsonl", offset))[0]:
        rows, offset = read
        found |= dict(filter(None, map(timestamp_anchor, rows)))
    steps = sorted(found)
    return float(np.interp(step, steps, [found[step] for step in steps]))


def releases_state(run: Path) -> list[tuple[str, int, int]]:
    """What changes when the scores of a run's releases or of its baselines do."""
    folder = run / "releases"
    paths = [folder / "releases.json", *folder.glob("[!.]*/evaluation.json"), *folder.glob("baselines/*.json")]
    found = [(str(path), path.stat()) for path in sorted(paths) if path.is_file()]
    return [(name, status.st_mtime_ns, status.st_size) for name, status in found]


def release_scores(run: Path) -> Iterator[tuple[int, int, Scores]]:
    """Step, tokens and scores of each release of the run that has any."""
    for row in _table(run)["releases"]:
        path = run / "releases" / row["folder"] / "evaluation.json"
        evaluation = read_json(path) if path.is_file() else None
        if evaluation and evaluation["step"] == row["step"]:
            yield row["step"], row["tokens"], _scores(evaluation)


def baseline_scores(run: Path, metrics: Collection[str]) -> dict[str, Scores]:
    """Baseline -> its scores, as far as they are of these metrics: those measured here, then the published ones.

    Of a published model with several checkpoints, the last.
    """
    measured = map(read_json, sorted((run / "releases/baselines").glob("*.json")))
    found = {evaluation["model"]: _scores(evaluation) for evaluation in measured}
    for row in _table(run)["baselines"]:
        if row["source"] and row["source"].startswith("published"):
            found[_published(row["name"])] = {_HELLASWAG: row["hellaswag"]}
    kept = {name: {key: scores[key] for key in metrics if key in scores} for name, scores in found.items()}
    return {name: scores for name, scores in kept.items() if scores}


def possible_baselines(run: Path, recipe: Recipe) -> list[str]:
    """The names of the baselines whose scores the run may get: none where it neither has releases nor will have."""
    published = [row["name"] for row in _table(run)["baselines"] if (row["source"] or "").startswith("published")]
    if not published and (recipe.release.at_tokens or recipe.release.every_tokens):
        published = [baseline.name for baseline in PUBLISHED_BASELINES]
    return [*recipe.release.baselines, *dict.fromkeys(map(_published, published))] if published else []


def _published(name: str) -> str:
    """A published model without its step: of several checkpoints the last is shown."""
    return f"{name.split(' step ', maxsplit=1)[0]} (published)"


def _table(run: Path) -> dict[str, list[Row]]:
    path = run / "releases/releases.json"
    return read_json(path) if path.is_file() else {"releases": [], "baselines": []}


def _scores(evaluation: Row) -> Scores:
    """Points by task: acc_norm where a task has it, else acc."""
    found: Scores = {}
    for task, row in evaluation["rows"].items():
        if score := task_score(row):
            found[f"scores/{task} {score.metric}"] = score.value
    return found
