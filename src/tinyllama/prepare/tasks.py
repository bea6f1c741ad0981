"""Tasks of `prepare`; each task converts consecutive input files of one source to one shard.

A task reads documents, cleans and tokenizes them, and writes a shard and a completion record. The record has the hashes
of the task's inputs and outputs. A task that has a record does not run again. The tasks depend only on the recipe and
the input files. Therefore the number of workers, the executor and interruptions do not change the store.
"""

import errno
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any

import orjson
from datatrove.data import Document
from loguru import logger

from tinyllama.data.store import WORK_DIR
from tinyllama.data.writer import ShardWriter
from tinyllama.errors import InputError
from tinyllama.files import atomic_write, sha256_of, write_json
from tinyllama.prepare.cleaning import (
    KEPT_DOCUMENT,
    MATCHING_ITEMS,
    URL,
    CleaningStage,
    cleaning_stages,
    cleaning_steps,
)
from tinyllama.prepare.files import local_copy
from tinyllama.prepare.readers import FileCounts, RejectedRow, read_rows
from tinyllama.prepare.selection import hash_to_unit_interval, split_tail
from tinyllama.prepare.sources import InputFile, check_sources_disjoint, list_files
from tinyllama.prepare.store_warnings import HELD_OUT, TAIL_HELD_OUT, too_short
from tinyllama.recipe import Cleaning, Recipe
from tinyllama.text import TextLike, iter_utf8_chunks, to_str
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.encoder import TokenIds

# A source of 64 MiB or more has at least about 64 tasks, so that a small data set also uses many workers. For large
# data, a task has about 64 MiB of compressed files, for example 60 million tokens of SlimPajama, and takes half a
# minute on one core. The number of files per task is a power of two, so that a change of one file's size rarely changes
# the other tasks.
_MAX_TASK_BYTES, _MIN_TASK_BYTES, _MIN_TASKS = 64 << 20, 1 << 20, 64

_SHARD_FILES = r"(train|validation)/(manifest\.json|rejects\.jsonl|\d{5,}\.(tokens|documents|rows))"
_WORK_FILES = (
    re.escape(WORK_DIR)
    + r"/(plan\.json|(completion_records|rejects|block_lists|filtered|decontamination|exact|minhash)/.+)"
)

TOKENS = "tokens"
"""Name of the last stage, which writes the shards; the earlier stages are `Job.cleaning`."""
_MAX_REJECTS_BYTES = 1 << 28
"""Maximum size of a task's list of rejected rows in bytes; further rows are only counted."""
_REPAIRED = "lone surrogates became U+FFFD"

logger.disable("datatrove")  # every worker would log every task, but the progress bar already shows the tasks


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

    def find_foreign(self, folder: Path) -> Path | None:
        """Return a file below `folder` that neither `prepare` nor the operating system writes, or None."""
        files = (path for path in folder.rglob("*") if not (path.is_dir() or self.is_own(path)))
        return next((path for path in files if not re.fullmatch(r"\.nfs.*|\.DS_Store", path.name, re.DOTALL)), None)

    def delete_work(self) -> None:
        """Delete the files of unfinished work, and the folders that are then empty. Links are kept and not followed."""
        if self.work.is_symlink():
            return
        for path in sorted(self.work.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):
                    path.rmdir()
            elif self.is_own(path) and not path.is_symlink():
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.work.rmdir()

    def is_own(self, path: Path) -> bool:
        """Return whether `prepare` writes a file, or the temporary file of one, at this path in the store."""
        shards = rf"({'|'.join(map(re.escape, self.recipe.data.sources))})/{_SHARD_FILES}"
        pattern = rf"(manifest\.(json|sha256)|{shards}|{_WORK_FILES})(\.[^/]+\.\d+\.part)?"
        return re.fullmatch(pattern, path.relative_to(self.store).as_posix(), re.DOTALL) is not None

    def delete_temp_files(self) -> None:
        """Delete the temporary files of killed workers."""
        for path in self.store.rglob("*.part"):
            if self.is_own(path):
                path.unlink(missing_ok=True)

    @property
    def slurm(self) -> Path:
        """Folder of Slurm's logs and job numbers, which is not deleted when the store is finished."""
        return self.store.with_name(f"{self.store.name}.slurm")

    @property
    def stages(self) -> dict[str, int]:
        """Number of tasks of each stage by the stage's name, in the order of the stages."""
        return {stage.name: stage.tasks for stage in self.cleaning} | {TOKENS: len(self.tasks)}

    def completion_record(self, stage: str, rank: int) -> Path:
        """Return the path of the file that marks task `rank` of a stage as finished."""
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


@dataclass
class TaskStats:
    """Counts of a task's rows and the hashes of its inputs, for its completion record."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of dropped rows, by reason."""
    changed: Counter[str] = field(default_factory=Counter)
    """Number of changed rows, by reason."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """Entries of `FileCounts.warnings` for all files of the task."""
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """Path, size in bytes and SHA-256 of each input, and its number of documents in each split."""
    contaminated: list[dict[str, list[int]]] = field(default_factory=list)
    """Matching items of each contaminated document, by evaluation task."""
    subsets: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    """Number of documents, tokens and bytes of text, by split and subset."""

    def count_written(self, split: str, metadata: dict[str, Any], tokens: int, text_bytes: int) -> None:
        """Count a document that was written."""
        documents = self.inputs[metadata["input"]]["documents"]
        documents[split] = documents.get(split, 0) + 1
        counts = self.subsets.setdefault(split, {}).setdefault(metadata["subset"], Counter())
        counts.update(documents=1, tokens=tokens, text_bytes=text_bytes)

    def count_changed(self, reason: str) -> None:
        """Count a document that cleaning changed."""
        self.changed[reason] += 1

    def count_dropped(self, document: Document) -> None:
        """Count a document that cleaning dropped."""
        self.dropped[str(document.metadata["filter_reason"])] += 1
        if found := document.metadata.get(MATCHING_ITEMS):
            self.contaminated.append(found)


def run_task(job: Job, stage: str, rank: int) -> None:
    """Run task `rank` of a stage, unless it has a completion record.

    Raises InputError if an input is not readable or the store is not writable.
    """
    path = job.completion_record(stage, rank)
    if path.is_file():
        return
    with translate_write_errors(job.store):
        if stage == TOKENS:
            record = _write_tokens(job, rank)
        else:
            stats = TaskStats()
            (own,) = (one for one in job.cleaning if one.name == stage)
            own.run(_read_documents(job, rank, stats, None), rank)
            record = {"inputs": stats.inputs}
        write_json(path, record)


@contextmanager
def translate_write_errors(store: Path) -> Iterator[None]:
    """Convert errors from writing the store (disk full, no permission, out of memory) to InputError."""
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "remove the cause"
        reason = error.strerror or error
        raise InputError(
            f"{store}: not writable ({reason}); {remedy} and run prepare again, which resumes the work"
        ) from None
    except MemoryError:
        raise InputError(
            f"{store}: a worker is out of memory; to resume, run prepare again with fewer data.workers or more memory"
        ) from None


def _read_documents(job: Job, rank: int, stats: TaskStats, rejects: IO[bytes] | None) -> Iterator[Document]:
    """Yield the usable rows of a task's files; count the other rows, and list faulty rows in the rejects file."""
    task = job.tasks[rank]
    source = job.recipe.data.sources[task.source]
    is_cleaned = source.clean != Cleaning()
    for number, path in enumerate(task.files):
        entry: dict[str, Any] = {"path": path, "bytes": 0, "sha256": "", "documents": {}}
        stats.inputs.append(entry)
        counts = FileCounts(path)
        with local_copy(path) as local:
            for row in read_rows(path, source, local, counts):
                stats.read += 1
                if isinstance(row, RejectedRow):
                    stats.dropped[row.reason] += 1
                    if not row.is_intentional:
                        line = {"line": row.line} if row.line else {}
                        _write_reject(rejects, {"file": path, "row": row.row} | line | {"reason": row.reason})
                else:
                    if row.repaired:
                        stats.changed[_REPAIRED] += 1
                    metadata = {"subset": row.subset, "input": number, "row": row.row, URL: row.url}
                    text = to_str(row.text) if is_cleaned else row.text  # datatrove's filters need str
                    yield Document(text=text, id=f"{path}:{row.row}", metadata=metadata)
            entry |= {"bytes": local.stat().st_size, "sha256": sha256_of(local)}
        stats.warnings += counts.warnings()


def _write_reject(rejects: IO[bytes] | None, entry: dict[str, Any]) -> None:
    if rejects is not None and rejects.tell() < _MAX_REJECTS_BYTES:
        rejects.write(orjson.dumps(entry) + b"\n")


def _write_tokens(job: Job, rank: int) -> dict[str, Any]:
    """Write the shards of a task and its list of rejected rows and duplicates; return its completion record."""
    task, stats = job.tasks[rank], TaskStats()
    with ExitStack() as stack:
        rejects = stack.enter_context(atomic_write(job.rejects_path(rank)))

        def on_drop(document: Document) -> None:
            stats.count_dropped(document)
            if kept := document.metadata.get(KEPT_DOCUMENT):
                place = {"file": task.files[document.metadata["input"]], "row": document.metadata["row"]}
                kept_place = {"file": job.tasks[kept.task].files[kept.file], "row": kept.row}
                reason = document.metadata["filter_reason"]
                _write_reject(rejects, place | {"reason": reason, "kept": kept_place})

        documents = _read_documents(job, rank, stats, rejects)
        for step in cleaning_steps(job.recipe, task.source, rank, job.work, on_drop, stats.count_changed):
            documents = step(documents)
        splits = [task.split, "validation"] if task.validation_fraction else [task.split]
        folder = job.store / task.source
        writers = {split: stack.enter_context(ShardWriter(folder / split, task.number)) for split in splits}
        _tokenize(job, task, documents, stats, writers)
    if task.validation_fraction:
        held_out = writers["validation"].documents
        if job.recipe.data.sources[task.source].holdout == "tail":
            stats.changed[TAIL_HELD_OUT] = held_out
        else:
            stats.dropped[HELD_OUT] = held_out
    shards = {split: writer.entry() for split, writer in writers.items() if writer.documents}
    return vars(stats) | {"task": job.fingerprint(rank), "shards": shards}


def _tokenize(
    job: Job, task: Task, documents: Iterator[Document], stats: TaskStats, writers: dict[str, ShardWriter]
) -> None:
    """Write each document's tokens to its split and count the document; a document below `min_tokens` is dropped."""
    special_tokens, tokenizer = job.recipe.data.document, cached_tokenizer(job.recipe.tokenizer)
    min_tokens = job.recipe.data.sources[task.source].min_tokens
    for document in documents:
        texts = _assign_splits(job, task, document.text)
        encoded: list[Iterable[TokenIds]]
        encoded = [tokenizer.encode_parts(text, special_tokens.bos, special_tokens.eos) for _, text in texts]
        if min_tokens is not None:
            encoded = [list(parts) for parts in encoded]
            if sum(map(len, chain.from_iterable(encoded))) < min_tokens:
                stats.dropped[too_short(min_tokens)] += 1
                continue
        for (split, text), parts in zip(texts, encoded, strict=True):
            num_tokens = writers[split].write(parts, document.metadata["row"])
            stats.count_written(split, document.metadata, num_tokens, sum(map(len, iter_utf8_chunks(text))))
        del document, texts, text, encoded, parts  # frees the text before the next document is read


def _assign_splits(job: Job, task: Task, text: TextLike) -> list[tuple[str, TextLike]]:
    """Return the split and the text of a document; if its tail is held out, return both for each of the two parts."""
    fraction = task.validation_fraction
    if not fraction:
        return [(task.split, text)]
    if job.recipe.data.sources[task.source].holdout != "tail":
        return [("validation" if hash_to_unit_interval(text) < fraction else task.split, text)]
    head, tail = split_tail(text, fraction)
    return [(task.split, head), ("validation", tail)] if tail else [(task.split, text)]


@lru_cache(maxsize=1)
def cached_tokenizer(path: str) -> Tokenizer:
    """Return the tokenizer in the folder `path`; load it only once per process.

    Forked workers inherit the loaded tokenizer. The cache of its encoder is kept between tasks.
    """
    return Tokenizer.load(path)
