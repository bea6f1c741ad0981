"""Programs and recipes on several ranks: real processes, started by torchrun."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.train import recording_trainer

from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir


def write_recipe(folder: Path, small: Path, name: str, **fields: object) -> str:
    """Write `NAME.yaml`, the small recipe with some fields replaced; return the file's name."""
    file = f"{name}.yaml"
    (folder / file).write_text(Recipe.load(small / "recipe.yaml", {"name": name, **fields}).to_yaml())
    return file


def run_torchrun(folder: Path, ranks: int, *arguments: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a folder on so many ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [sys.executable, *torchrun, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=timeout,
    )


def train_recipes(folder: Path, ranks: int, recipes: list[str]) -> None:
    """Train recipes one after the other on so many ranks, one rank in this process; see `recording_trainer`."""
    if ranks == 1:
        with contextlib.chdir(folder):
            recording_trainer.main(recipes)
        return
    done = run_torchrun(folder, ranks, recording_trainer.__file__, *recipes)
    assert done.returncode == 0, done.stderr


def metric_by_step(folder: Path, name: str, key: str = "loss") -> list[float]:
    """Return a metric of each step of a run."""
    return [row[key] for row in RunDir(folder / "runs" / name).metrics()]


def sequences_read(folder: Path, name: str, ranks: int) -> NDArray[np.int64]:
    """Return what all ranks read: int64 [steps, batch_sequences, sequence_length + 1], ranks in their order."""
    recipe = Recipe.load(folder / f"{name}.yaml").train
    per_rank = [np.fromfile(folder / f"{name}.{rank}.rows", np.int64) for rank in range(ranks)]
    size = (recipe.steps, recipe.batch_sequences // ranks, recipe.sequence_length + 1)
    return np.concatenate([sequences.reshape(size) for sequences in per_rank], axis=1)
