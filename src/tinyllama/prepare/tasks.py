"""What there is to prepare, cut into tasks that follow from the recipe and the input files alone.

A task is a run of one source's sorted files; its number is its shard's. Workers only take tasks and a finished one
leaves a receipt, so neither their number, nor the executor, nor an interruption can change a byte.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama.data.store import WORK_DIR
from tinyllama.prepare.sources import InputFile, check_sources_disjoint, list_files
from tinyllama.recipe import Recipe

# At least 64 tasks a source where they have a mebibyte each, so that small data keeps many workers busy too; at full
# size about 64 MiB of compressed files: 60 million tokens of SlimPajama, half a minute of one core. A task is a number
# of files, a power of two, so that one file of another size changes its own task and no other.
_MOST_BYTES, _LEAST_BYTES, _TASKS = 64 << 20, 1 << 20, 64

TOKENS = "tokens"
"""The stage that writes them; what cleaning needs before has stages of its own."""


@dataclass(frozen=True)
class Task:
    """Files whose documents become one shard of a split."""

    source: str
    split: str
    number: int
    """Of the shard."""
    files: tuple[str, ...]
    """Local paths or URLs."""
    holdout: float
    """Share of documents that go to validation instead."""

    @property
    def name(self) -> str:
        """What its files are called: its rank changes when files of other tasks come or go."""
        return f"{self.source}.{self.split}.{self.number:05d}"


@dataclass(frozen=True)
class Job:
    """A recipe and its tasks: all that a worker needs to know."""

    recipe: Recipe
    tasks: tuple[Task, ...]
    inputs: dict[str, int]
    """Bytes of each input file."""
    left_out: dict[str, dict[str, int]]
    """Of each source, how many files the recipe or their split leaves out, by reason."""

    @property
    def store(self) -> Path:
        """The token store's folder."""
        return Path(self.recipe.data.store)

    @property
    def work(self) -> Path:
        """Where what is under way is kept."""
        return self.store / WORK_DIR

    @property
    def slurm(self) -> Path:
        """What Slurm's jobs keep, their logs among it; it stays when the store is finished."""
        return self.store.with_name(f"{self.store.name}.slurm")

    def completion_record(self, stage: str, rank: int) -> Path:
        """The file that says that task `rank` of a stage is done."""
        name = self.tasks[rank].name if stage == TOKENS else f"{rank:06d}"
        return self.work / "receipts" / stage / f"{name}.json"

    def unfinished(self, stage: str, ranks: Iterable[int]) -> list[int]:
        """Those tasks of a stage that have no receipt."""
        return [rank for rank in ranks if not self.completion_record(stage, rank).is_file()]

    def rejects_path(self, rank: int) -> Path:
        """Where task `rank` lists its rejects until the split's list is made of all tasks'."""
        return self.work / "rejects" / f"{self.tasks[rank].name}.jsonl"

    def identity(self, rank: int) -> list[Any]:
        """What a task is, in JSON's terms: its receipt is of no other."""
        task = self.tasks[rank]
        return [[file, self.inputs[file]] for file in task.files] + [task.holdout]


def plan_job(recipe: Recipe) -> Job:
    """List every source's files and cut them into tasks.

    Raises InputError where a source has no files, or where two sources read the same ones.
    """
    left_out: dict[str, Counter[str]] = {name: Counter() for name in recipe.data.sources}
    files = {name: list_files(name, source, left_out[name]) for name, source in recipe.data.sources.items()}
    check_sources_disjoint(recipe.data.sources, files)
    tasks = tuple(task for name, own in files.items() for task in _tasks(name, own, recipe.data.validation_fraction))
    inputs = {file.path: file.size for own in files.values() for file in own}
    return Job(recipe, tasks, inputs, {name: dict(sorted(count.items())) for name, count in left_out.items()})


def _tasks(name: str, files: list[InputFile], holdout: float) -> Iterator[Task]:
    share = 0.0 if any(file.split == "validation" for file in files) else holdout
    total = sum(file.size for file in files)
    task_bytes = min(_MOST_BYTES, max(_LEAST_BYTES, total // _TASKS))
    num_files = 1 << round(math.log2(max(1.0, task_bytes * len(files) / max(1, total))))
    for split in ("train", "validation"):
        own = [file.path for file in files if file.split == split]
        for number, start in enumerate(range(0, len(own), num_files)):
            yield Task(name, split, number, tuple(own[start : start + num_files]), share)
