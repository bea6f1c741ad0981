"""Scores are kept: beside a model that is here, and those of other tasks stay beside new ones of the same weights."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllama.evaluate import report
from tinyllama.evaluate.report import _merge_previous, evaluate_and_save, table
from tinyllama.evaluate.scores import Evaluation
from tinyllama.files import read_json
from tinyllama.loading import ModelLocation


def evaluation(task: str, step: int, **fields: Any) -> Evaluation:
    given: dict[str, Any] = {
        "model": "runs/x",
        "step": step,
        "tokens": step * 100,
        "limit": None,
        "precision": "bfloat16",
        "rows": {task: {"acc": 0.5, "items": 10}},
        "coverage": {task: "all 10 items"},
        "data": {task: "hub"},
        "versions": {},
        "seconds": 1.0,
        "num_fewshot": {task: 0},
    }
    return Evaluation(**given | fields)


def test_scores_of_other_tasks_stay_unless_the_weights_or_the_software_are_others(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    evaluation("piqa", 10, shortened={"piqa": 3}).save(path)
    both = _merge_previous(evaluation("hellaswag", 10), path)
    assert set(both.rows) == set(both.num_fewshot) == {"piqa", "hellaswag"}
    assert both.shortened == {"piqa": 3}
    assert _merge_previous(evaluation("piqa", 10), path).shortened == {}
    few = evaluation("piqa", 10, rows={"piqa": {"acc": 0.9, "items": 4}}, coverage={"piqa": "first 4 of 10 items"})
    assert _merge_previous(few, path).rows["piqa"]["acc"] == 0.5  # of more items, which took longer
    assert _merge_previous(few, path).coverage["piqa"] == "all 10 items"
    assert _merge_previous(replace(few, num_fewshot={"piqa": 5}), path).rows["piqa"]["acc"] == 0.9  # another question
    assert set(_merge_previous(evaluation("hellaswag", 20), path).rows) == {"hellaswag"}
    assert set(_merge_previous(evaluation("hellaswag", 10, versions={"torch": "3"}), path).rows) == {"hellaswag"}


def test_a_hub_models_scores_go_to_the_working_directory_and_not_into_the_hubs_cache(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = shutil.copytree(llama_folder, tmp_path / "cache")
    before = sorted(cached.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "locate", lambda source: ModelLocation(cached, is_checkpoint=False))
    said = evaluate_and_save("org/name", ["winogrande"], 3, torch.float32)
    assert said.splitlines()[-1] == "saved: evaluations/org--name.json"
    assert read_json(tmp_path / "evaluations/org--name.json")["model"] == "org/name"
    assert sorted(cached.iterdir()) == before


def test_the_table_has_every_score_with_its_error_and_what_it_is_of() -> None:
    rows = {
        "piqa": {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": 0.6, "acc_norm_stderr": 0.02, "bits_per_byte": 1.5},
        "lambada_openai": {"acc": 0.25, "acc_stderr": 0.01, "perplexity": 12.5, "perplexity_stderr": 0.5, "items": 10},
    }
    said = evaluation(
        "piqa",
        10,
        rows=rows,
        coverage=dict.fromkeys(rows, "all 10 items"),
        data=dict.fromkeys(rows, "hub"),
        num_fewshot={"piqa": 5},
        shortened={"piqa": 2},
    )
    assert list(table(said)) == [
        "task            acc           acc_norm      bits per byte  scored on",
        "piqa            50.00 ± 1.00  60.00 ± 2.00  1.5000         all 10 items (hub), 5 examples before each",
        "lambada_openai  25.00 ± 1.00  -             -              all 10 items (hub)",
        "lambada_openai: perplexity 12.5 ± 0.5",
        "piqa: 2 requests lost their beginning, for they are longer than the model's context",
    ]
