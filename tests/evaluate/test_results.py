"""Evaluation results: merging with earlier ones, and their text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.release import conftest

from tinyllama.evaluate.results import Evaluation, format_evaluation, score_rows, task_score


def evaluation(task: str, step: int, **fields: Any) -> Evaluation:
    """Return scores on all 10 items of a task."""
    own: dict[str, Any] = {
        "limit": None,
        "rows": {task: {"acc": 0.5, "items": 10}},
        "coverage": {task: "all 10 items"},
        "data": {task: "hub"},
        "num_fewshot": {task: 0},
    }
    return conftest.evaluation(step=step, **own | fields)


def test_scores_of_other_tasks_are_kept_for_the_same_weights_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    evaluation("piqa", 10, shortened={"piqa": 3}).save(path)
    both = evaluation("hellaswag", 10).merged_with(path)
    assert set(both.rows) == set(both.num_fewshot) == {"piqa", "hellaswag"}
    assert both.shortened == {"piqa": 3}
    assert evaluation("piqa", 10).merged_with(path).shortened == {}
    assert set(evaluation("hellaswag", 20).merged_with(path).rows) == {"hellaswag"}
    assert set(evaluation("hellaswag", 10, versions={"torch": "3"}).merged_with(path).rows) == {"hellaswag"}


def test_earlier_score_of_more_items_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    evaluation("piqa", 10).save(path)
    fewer = evaluation("piqa", 10, rows={"piqa": {"acc": 0.9, "items": 4}}, coverage={"piqa": "first 4 of 10 items"})
    assert fewer.merged_with(path).rows["piqa"]["acc"] == 0.5
    assert fewer.merged_with(path).coverage["piqa"] == "all 10 items"
    assert replace(fewer, num_fewshot={"piqa": 5}).merged_with(path).rows["piqa"]["acc"] == 0.9


def test_score_prefers_acc_norm_and_is_in_per_cent() -> None:
    row = {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": 0.6, "perplexity": 12.5}
    assert [str(task_score(row, metric)) for metric in (None, "acc", "perplexity")] == ["60.00", "50.00 ± 1.00", "12.5"]
    assert task_score({"acc": 0.25}) == task_score({"acc": 0.25}, "acc")
    assert task_score({"perplexity": 12.5}) is None


def test_every_score_is_listed_with_its_error_and_items() -> None:
    rows = {
        "piqa": {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": 0.6, "acc_norm_stderr": 0.02, "bits_per_byte": 1.5},
        "lambada_openai": {
            "acc": 0.25,
            "acc_stderr": 0.01,
            "perplexity": 12.5,
            "perplexity_stderr": 0.5,
            "items": 10,
            "chance": 0.1,
        },
    }
    of_both: dict[str, Any] = {
        "rows": rows,
        "coverage": dict.fromkeys(rows, "all 10 items"),
        "data": dict.fromkeys(rows, "hub"),
        "num_fewshot": {"piqa": 5},
        "shortened": {"piqa": 2},
    }
    assert list(score_rows(of_both)) == [
        ("piqa", "50.00 ± 1.00", "60.00 ± 2.00", "1.5000", "all 10 items, 5 examples before each", "hub"),
        ("lambada_openai", "25.00 ± 1.00", "", "", "all 10 items", "hub"),
    ]
    *table, others, truncated = format_evaluation(evaluation("piqa", 10, **of_both))
    assert len(table) == 3 and "60.00 ± 2.00" in table[1]
    assert others == "lambada_openai: perplexity 12.5 ± 0.5"
    assert truncated.startswith("piqa: 2 requests")
