"""Scores are kept: those of other tasks stay beside new ones of the same weights."""

from pathlib import Path

from tinyllama.evaluate.report import _with_earlier
from tinyllama.evaluate.scores import Evaluation


def evaluation(task: str, step: int) -> Evaluation:
    return Evaluation(
        model="runs/x",
        step=step,
        tokens=step * 100,
        limit=None,
        precision="bfloat16",
        rows={task: {"acc": 0.5}},
        coverage={task: "all 10 items"},
        data={task: "hub"},
        versions={},
        seconds=1.0,
    )


def test_scores_of_other_tasks_stay_unless_the_weights_are_others(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    evaluation("piqa", 10).save(path)
    assert set(_with_earlier(evaluation("hellaswag", 10), path).rows) == {"piqa", "hellaswag"}
    assert set(_with_earlier(evaluation("hellaswag", 20), path).rows) == {"hellaswag"}
