"""Evaluation of the model that a run trains: what it leaves unchanged, and errors before the first step."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.single_process import SINGLE_PROCESS, build_state, load_recipe

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.evaluate.evaluation import load_evaluator

FIELDS = {"train.evaluate_every_steps": 1, "train.evaluate_tasks": "winogrande", "train.evaluate_limit": 40}


def test_evaluation_is_repeatable_and_changes_no_state_of_training(small: Path) -> None:
    recipe = load_recipe(small, **FIELDS)
    state, beats = build_state(recipe), []
    state.model.train()
    evaluate = load_evaluator(recipe, state.tokenizer, SINGLE_PROCESS)
    weights = {name: weight.clone() for name, weight in state.model.state_dict().items()}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    first, second = (evaluate(state.model, step, lambda: beats.append(1)) for step in (3, 4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(np.random.get_state(legacy=False)) == str(before[2])
    assert all(torch.equal(weight, weights[name]) for name, weight in state.model.state_dict().items())
    assert state.model.training and all(weight.requires_grad for weight in state.model.parameters())
    assert (first.rows, first.shortened) == (second.rows, second.shortened)
    assert (first.step, first.tokens, second.step) == (3, 3 * 6 * 64, 4)
    assert len(beats) == 2 * 2  # one per batch of 64 requests


def test_metrics_that_are_not_finite_are_excluded(small: Path) -> None:
    recipe = load_recipe(small, **FIELDS)
    state = build_state(recipe)
    with torch.no_grad():
        state.model.head_weight.fill_(float("nan"))
    evaluation = load_evaluator(recipe, state.tokenizer, SINGLE_PROCESS)(state.model, 1, lambda: None)
    assert "acc" in evaluation.rows["winogrande"] and "bits_per_byte" not in evaluation.rows["winogrande"]


def test_request_that_exceeds_the_context_is_an_error_before_training(small: Path) -> None:
    shape = {"model.context_length": 4, "train.sequence_length": 4}
    recipe = load_recipe(small, **FIELDS | shape)
    state = build_state(recipe)
    with pytest.raises(InputError, match=r"winogrande: a continuation has .* context length is 4"):
        load_evaluator(recipe, state.tokenizer, SINGLE_PROCESS)


def test_task_without_items_is_refused_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--train.evaluate_every_steps", "1", "--train.evaluate_tasks", "lambada_openai"]
    assert cli.main(["train", str(small / "recipe.yaml"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "task lambada_openai: " in line and "items" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fields", [{"train.evaluate_tasks": []}, {"train.evaluate_limit": 1}], ids=["tasks", "limit"])
def test_fields_without_meaning_are_refused(small: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        load_recipe(small, **fields)


def test_evaluation_does_not_change_the_digest(small: Path) -> None:
    assert load_recipe(small).digest == load_recipe(small, **FIELDS).digest
