"""A run that trained, skipped a batch, was released and scored, and copies of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.release.conftest import evaluation
from tests.train.launch import fault_in_batch, train_to_end

from tinyllama.recipe import Recipe
from tinyllama.release.card import update_card
from tinyllama.release.release import release_run


@pytest.fixture(scope="session")
def trained(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 40 steps, read-only."""
    recipe = Recipe.load(small / "recipe.yaml")
    run = train_to_end(small, tmp_path_factory.mktemp("trained"), faults=[fault_in_batch(recipe, "nan", 12, 0)])
    release = release_run(run, formats=("huggingface",))
    evaluation().save(release / "evaluation.json")
    update_card(release)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "small"))


def change_jsonl(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Replace the rows of a JSONL file."""
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
