"""Two real ranks score what one scores, bit for bit, and one of them speaks and writes."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.conftest import scored

from tinyllama.files import read_json

pytestmark = pytest.mark.slow

# Each argument is a model; the ranks score one after the other, for starting is what takes long.
SCORE = """
import sys
from tinyllama import cli
for model in sys.argv[1:]:
    flags = ["--tasks", "winogrande", "arc_easy", "--limit", "12", "--precision", "fp32", "--batch-size", "16"]
    if status := cli.main(["evaluate", model, *flags]):
        sys.exit(status)
"""
TASKS = ("winogrande", "arc_easy")


@pytest.fixture(scope="module")
def by_two(llama_folder: Path, neox_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder in which two ranks scored copies of `llama` and `neox`, and what they printed."""
    folder = tmp_path_factory.mktemp("by-two")
    for name, model in (("llama", llama_folder), ("neox", neox_folder)):
        shutil.copytree(model, folder / name)
    (folder / "score.py").write_text(SCORE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "score.py", "llama", "neox"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def lasting(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in evaluation.items() if name not in ("seconds", "model")}


def test_a_llamas_scores_are_those_of_one_process_bit_for_bit(
    by_two: tuple[Path, str, str], llama_folder: Path
) -> None:
    alone = scored(llama_folder, TASKS, limit=12)
    assert lasting(read_json(by_two[0] / "llama/evaluation.json")) == lasting(vars(alone))


def test_another_models_scores_are_those_of_one_process(by_two: tuple[Path, str, str], neox_folder: Path) -> None:
    rows, alone = read_json(by_two[0] / "neox/evaluation.json")["rows"], scored(neox_folder, TASKS, limit=12).rows
    assert rows == {task: pytest.approx(row, rel=1e-6) for task, row in alone.items()}


def test_one_rank_prints_the_tables(by_two: tuple[Path, str, str]) -> None:
    _, out, err = by_two
    assert [line for line in out.splitlines() if line.startswith("saved")] == [
        "saved: llama/evaluation.json",
        "saved: neox/evaluation.json",
    ]
    assert out.count("winogrande") == 2
    assert err.count("scoring: ") == 1
