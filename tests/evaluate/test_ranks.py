"""Evaluation on two ranks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.conftest import scored
from tests.train.torchrun import run_torchrun

from tinyllama.files import read_json

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("scoring_program.py")
TASKS = ("winogrande", "arc_easy")


@pytest.fixture(scope="module")
def two_ranks(llama_folder: Path, neox_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder in which two ranks scored copies of `llama` and `neox`, and what they printed."""
    folder = tmp_path_factory.mktemp("two-ranks")
    for name, model in (("llama", llama_folder), ("neox", neox_folder)):
        shutil.copytree(model, folder / name)
    done = run_torchrun(folder, 2, str(PROGRAM), "llama", "neox", timeout=200)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def comparable(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in evaluation.items() if name not in ("seconds", "model")}


@pytest.mark.long
def test_llama_scores_equal_those_of_one_process_bit_for_bit(
    two_ranks: tuple[Path, str, str], llama_folder: Path
) -> None:
    expected = scored(llama_folder, TASKS, limit=12)
    assert comparable(read_json(two_ranks[0] / "llama/evaluation.json")) == comparable(vars(expected))


def test_scores_of_other_models_equal_those_of_one_process(two_ranks: tuple[Path, str, str], neox_folder: Path) -> None:
    rows, expected = read_json(two_ranks[0] / "neox/evaluation.json")["rows"], scored(neox_folder, TASKS, limit=12).rows
    assert rows == {task: pytest.approx(row, rel=1e-6) for task, row in expected.items()}


def test_only_rank_0_prints(two_ranks: tuple[Path, str, str]) -> None:
    _, out, err = two_ranks
    assert [line for line in out.splitlines() if line.startswith("saved")] == [
        "saved: llama/evaluation.json",
        "saved: neox/evaluation.json",
    ]
    assert out.count("winogrande") == 2
    assert err.count("scoring: ") == 1
