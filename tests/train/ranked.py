"""Recipes on several ranks: real processes, started by torchrun."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.train import several

from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir


def write_recipe(folder: Path, small: Path, name: str, **fields: object) -> str:
    """Write `NAME.yaml`, the small recipe with some fields replaced; return the file's name."""
    file = f"{name}.yaml"
    (folder / file).write_text(Recipe.load(small / "recipe.yaml", {"name": name, **fields}).to_yaml())
    return file


def launch(folder: Path, ranks: int, *arguments: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    """Run a program of Python's in a folder, on so many ranks."""
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


def train_several(folder: Path, ranks: int, recipes: list[str]) -> None:
    """Train recipes one after the other on so many ranks, one of them being this very process; see `several`."""
    if ranks == 1:
        with contextlib.chdir(folder):
            several.main(recipes)
        return
    done = launch(folder, ranks, several.__file__, *recipes)
    assert done.returncode == 0, done.stderr


def losses(folder: Path, name: str, of: str = "loss") -> list[float]:
    """The loss, or something else in the metrics, of each step of a run."""
    return [row[of] for row in RunDir(folder / "runs" / name).metrics()]


def rows_read(folder: Path, name: str, ranks: int) -> NDArray[np.int64]:
    """What all ranks read, int64 [steps, batch_sequences, sequence_length + 1], ranks in their order."""
    recipe = Recipe.load(folder / f"{name}.yaml").train
    each = [np.fromfile(folder / f"{name}.{rank}.rows", np.int64) for rank in range(ranks)]
    size = (recipe.steps, recipe.batch_sequences // ranks, recipe.sequence_length + 1)
    return np.concatenate([rows.reshape(size) for rows in each], axis=1)
