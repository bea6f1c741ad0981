"""Tasks of `prepare`, each a series of consecutive input files of one source that become one shard.

The tasks depend only on the recipe and the input files, and each finished task writes a completion record. Therefore
the number of workers, the executor and interruptions do not change the store.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama.data.store import WORK_DIR
from tinyllama.prepare.cleaning import CleaningStage, cleaning_stages
from tinyllama.prepare.sources import InputFile, check_sources_disjoint, list_files
from tinyllama.recipe import Recipe

# A source has at least 64 tasks if each task has at least one mebibyte, so that small data also uses many workers. For
# large data, a task has about 64 MiB of compressed files: 60 million tokens of SlimPajama, half a minute on one core.
# The number of files per task is a power of two, so that a change of a file's size affects only the file's own task.
_MAX_TASK_BYTES, _MIN_TASK_BYTES, _MIN_TASKS = 64 << 20, 1 << 20, 64

TOKENS = "tokens"
"""Name of the last stage, which writes the shards; the earlier stages are `Job.cleaning`."""


@dataclass(frozen=True)
class Task:
    """Input files whose documents become one shard of a split."""

    source: str
    split: str
    number: int
    """Number of the shard."""
    files: tuple[str, ...]
    """Local paths or URLs."""
    validation_fraction: float
    """Fraction of the task's text that becomes part of the validation split."""

    @property
    def name(self) -> str:
        """Name of the task's files; unlike the task's rank, this name does not depend on other tasks."""
        return f"{self.source}.{self.split}.{self.number:05d}"


@dataclass(frozen=True)
class Job:
    """A recipe and its tasks, with all data that a worker needs."""

    recipe: Recipe
    tasks: tuple[Task, ...]
    inputs: dict[str, int]
    """Size of each input file in bytes."""
    skipped_files: dict[str, dict[str, int]]
    """Number of skipped files of each source, by reason."""
    cleaning: tuple[CleaningStage, ...]
    """Stages before the tokens are written."""

    @property
    def store(self) -> Path:
        """Folder of the token store."""
        return Path(self.recipe.data.store)

    @property
    def work(self) -> Path:
        """Folder of unfinished work."""
        return self.store / WORK_DIR

    @property
    def slurm(self) -> Path:
        """Folder of Slurm's logs and job numbers, which is not deleted when the store is finished."""
        return self.store.with_name(f"{self.store.name}.slurm")

    @property
    def stages(self) -> dict[str, int]:
        """Name and number of tasks of each stage, in order."""
        return {stage.name: stage.tasks for stage in self.cleaning} | {TOKENS: len(self.tasks)}

    def completion_record(self, stage: str, rank: int) -> Path:
        """Return the file that marks task `rank` of a stage as done, with the hashes of its inputs and outputs."""
        name = self.tasks[rank].name if stage == TOKENS else f"{rank:06d}"
        return self.work / "completion_records" / stage / f"{name}.json"

    def unfinished(self, stage: str) -> list[int]:
        """Return the ranks of the tasks of a stage that have no completion record."""
        ranks = range(self.stages[stage])
        return [rank for rank in ranks if not self.completion_record(stage, rank).is_file()]

    def rejects_path(self, rank: int) -> Path:
        """Return the file that lists the rejected rows of task `rank`."""
        return self.work / "rejects" / f"{self.tasks[rank].name}.jsonl"

    def fingerprint(self, rank: int) -> list[Any]:
        """Return the inputs of task `rank` as JSON; a completion record is valid while this value is unchanged."""
        task = self.tasks[rank]
        return [[file, self.inputs[file]] for file in task.files] + [task.validation_fraction]


def plan_job(recipe: Recipe) -> Job:
    """List every source's files and divide them into tasks.

    Raises InputError if a source has no files, or if two sources read the same file.
    """
    skipped: dict[str, Counter[str]] = {name: Counter() for name in recipe.data.sources}
    files = {name: list_files(name, source, skipped[name]) for name, source in recipe.data.sources.items()}
    check_sources_disjoint(recipe.data.sources, files)
    tasks = tuple(task for name, own in files.items() for task in _tasks(name, own, recipe.data.validation_fraction))
    inputs = {file.path: file.size for own in files.values() for file in own}
    skipped_files = {name: dict(sorted(count.items())) for name, count in skipped.items()}
    stages = cleaning_stages(recipe, [task.source for task in tasks], Path(recipe.data.store) / WORK_DIR)
    return Job(recipe, tasks, inputs, skipped_files, stages)


def _tasks(name: str, files: list[InputFile], validation_fraction: float) -> Iterator[Task]:
    if any(file.split == "validation" for file in files):
        validation_fraction = 0.0
    total = sum(file.size for file in files)
    task_bytes = min(_MAX_TASK_BYTES, max(_MIN_TASK_BYTES, total // _MIN_TASKS))
    num_files = 1 << round(math.log2(max(1.0, task_bytes * len(files) / max(1, total))))
    for split in ("train", "validation"):
        own = [file.path for file in files if file.split == split]
        for number, start in enumerate(range(0, len(own), num_files)):
            yield Task(name, split, number, tuple(own[start : start + num_files]), validation_fraction)
