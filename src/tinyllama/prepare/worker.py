"""One task of `prepare`: reading of documents, cleaning, tokenization, and writing of a shard and a completion record.

The completion record has the hashes of the task's inputs and outputs. A task with a completion record is not repeated.
"""

import errno
import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from datatrove.data import Document
from loguru import logger

from tinyllama.data.store import SUFFIXES
from tinyllama.errors import InputError
from tinyllama.files import atomic_write, sha256_of, write_json
from tinyllama.prepare.cleaning import MATCHING_ITEMS, cleaning_steps
from tinyllama.prepare.files import local_copy
from tinyllama.prepare.readers import FileCounts, RejectedRow, read_rows
from tinyllama.prepare.selection import hash_to_unit_interval, split_tail
from tinyllama.prepare.store_warnings import HELD_OUT, TAIL_HELD_OUT
from tinyllama.prepare.tasks import TOKENS, Job, Task
from tinyllama.recipe import Cleaning
from tinyllama.text import TextLike, iter_utf8_chunks, to_str
from tinyllama.tokenizer import Tokenizer

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "allow it",
    errno.EPERM: "allow it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
_MAX_REJECTS_BYTES = 1 << 28
"""Maximum size of a task's list of rejected rows in bytes; further rows are only counted."""
_REPAIRED = "lone surrogates became U+FFFD"

logger.disable("datatrove")  # every worker would log every task, but the progress bar already shows the tasks


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
            own.run(_read_documents(job, rank, stats), rank)
            record = {"inputs": stats.inputs}
        write_json(path, record)


@contextmanager
def translate_write_errors(store: Path) -> Iterator[None]:
    """Convert errors of writing the store (full disk, missing permissions, exhausted memory) to InputError."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "remove the cause")
        reason = error.strerror or error
        raise InputError(
            f"{store}: not writable ({reason}); {remedy} and run prepare again, which resumes from here"
        ) from None
    except MemoryError:
        raise InputError(
            f"{store}: a worker is out of memory; run prepare again with fewer data.workers or more memory, it resumes "
            "from here"
        ) from None


def _read_documents(job: Job, rank: int, stats: TaskStats) -> Iterator[Document]:
    """Yield the usable rows of a task's files; count the other rows, and list faulty rows in the rejects."""
    task = job.tasks[rank]
    source = job.recipe.data.sources[task.source]
    is_cleaned = source.clean != Cleaning()
    with atomic_write(job.rejects_path(rank)) as rejects:
        for number, path in enumerate(task.files):
            entry: dict[str, Any] = {"path": path, "bytes": 0, "sha256": "", "documents": {}}
            stats.inputs.append(entry)
            counts = FileCounts(path)
            with local_copy(path) as local:
                for row in read_rows(path, source, local, counts):
                    stats.read += 1
                    if isinstance(row, RejectedRow):
                        stats.dropped[row.reason] += 1
                        _write_reject(rejects, path, row)
                    else:
                        if row.repaired:
                            stats.changed[_REPAIRED] += 1
                        metadata = {"subset": row.subset, "input": number, "row": row.row}
                        text = to_str(row.text) if is_cleaned else row.text  # datatrove's filters need str
                        yield Document(text=text, id=f"{path}:{row.row}", metadata=metadata)
                entry |= {"bytes": local.stat().st_size, "sha256": sha256_of(local)}
            stats.warnings += counts.warnings()


def _write_reject(rejects: IO[bytes], path: str, row: RejectedRow) -> None:
    if not row.is_intentional and rejects.tell() < _MAX_REJECTS_BYTES:
        place = {"file": path, "row": row.row} | ({"line": row.line} if row.line else {})
        rejects.write(orjson.dumps(place | {"reason": row.reason}) + b"\n")


def _write_tokens(job: Job, rank: int) -> dict[str, Any]:
    """Write the shards of a task and return its completion record."""
    task, stats = job.tasks[rank], TaskStats()
    documents = _read_documents(job, rank, stats)
    for step in cleaning_steps(job.recipe, task.source, rank, job.work, stats.count_dropped):
        documents = step(documents)
    splits = [task.split, "validation"] if task.validation_fraction else [task.split]
    with ExitStack() as stack:
        folder = job.store / task.source
        writers = {split: stack.enter_context(ShardWriter(folder / split, task.number)) for split in splits}
        _tokenize(job, task, documents, stats, writers)
    if task.validation_fraction:
        held_out = writers["validation"].documents
        if job.recipe.data.sources[task.source].holdout == "tail":
            stats.changed[TAIL_HELD_OUT] = held_out
        else:
            stats.dropped[HELD_OUT] = held_out
    return {
        "task": job.fingerprint(rank),
        "inputs": stats.inputs,
        "read": stats.read,
        "dropped": dict(sorted(stats.dropped.items())),
        "changed": dict(sorted(stats.changed.items())),
        "warnings": stats.warnings,
        "contaminated": stats.contaminated,
        "subsets": {split: dict(sorted(counts.items())) for split, counts in stats.subsets.items()},
        "shards": {split: writer.entry() for split, writer in writers.items() if writer.documents},
    }


def _tokenize(
    job: Job, task: Task, documents: Iterator[Document], stats: TaskStats, writers: dict[str, "ShardWriter"]
) -> None:
    """Write each document's tokens to its split and count it."""
    pending: deque[tuple[str, dict[str, Any], int]] = deque()  # the tokenizer reads several documents ahead

    def texts() -> Iterator[TextLike]:
        for document in documents:
            for split, text in _assign_splits(job, task, document.text):
                pending.append((split, document.metadata, sum(map(len, iter_utf8_chunks(text)))))
                yield text

    special_tokens = job.recipe.data.document
    tokenizer = cached_tokenizer(job.recipe.tokenizer)
    for tokens in tokenizer.encode_documents(texts(), special_tokens.bos, special_tokens.eos):
        split, metadata, text_bytes = pending.popleft()
        writers[split].write(tokens, metadata["row"])
        stats.count_written(split, metadata, len(tokens), text_bytes)


def _assign_splits(job: Job, task: Task, text: TextLike) -> list[tuple[str, TextLike]]:
    """Return the split and the text of a document, or of both parts of a document whose tail is held out."""
    fraction = task.validation_fraction
    if not fraction:
        return [(task.split, text)]
    if job.recipe.data.sources[task.source].holdout != "tail":
        return [("validation" if hash_to_unit_interval(text) < fraction else task.split, text)]
    head, tail = split_tail(text, fraction)
    return [(task.split, head), ("validation", tail)] if tail else [(task.split, text)]


@lru_cache(maxsize=1)
def cached_tokenizer(path: str) -> Tokenizer:
    """Load the tokenizer in the folder `path`, but only once per process.

    Forked workers inherit the loaded tokenizer. Its cache is kept between tasks.
    """
    return Tokenizer.load(path)


class ShardWriter:
    """Writer of one shard: `00000.tokens`, `.documents` and `.rows`, which appear when the block ends.

    A shard without documents has no files. The hashes are computed from the bytes in memory, not from the bytes that a
    disk returns. The ends and rows of documents, 16 bytes per document, are kept in memory until the block ends.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"{number:05d}.tokens"
        self.tokens = 0
        self.hashes: dict[str, str] = {}
        self._ends, self._rows = array("Q"), array("Q")
        self._digest = hashlib.sha256()
        self._stack = ExitStack()
        self._file: IO[bytes]

    @property
    def documents(self) -> int:
        """Number of documents written so far."""
        return len(self._ends)

    def __enter__(self) -> "ShardWriter":
        self._file = self._stack.enter_context(atomic_write(self.path))
        return self

    def __exit__(self, error: type[BaseException] | None, *details: Any) -> None:
        if error is None:
            for suffix, values in ((".documents", self._ends), (".rows", self._rows)):
                data = np.array(values, "<u8").tobytes()
                self.hashes[suffix] = hashlib.sha256(data).hexdigest()
                with atomic_write(self.path.with_suffix(suffix)) as file:
                    file.write(data)
        self._stack.__exit__(error, *details)
        self.hashes[".tokens"] = self._digest.hexdigest()
        if not self.documents:
            for suffix in SUFFIXES:
                self.path.with_suffix(suffix).unlink(missing_ok=True)

    def write(self, tokens: np.ndarray[Any, Any], row: int) -> None:
        """Append one document's tokens; `row` is the index of its row in its input file."""
        self.tokens += len(tokens)
        self._ends.append(self.tokens)
        self._rows.append(row)
        self._file.write(tokens.data)
        self._digest.update(tokens.data)

    def entry(self) -> dict[str, Any]:
        """Return the finished shard's entry in its split's manifest."""
        return {
            "file": self.path.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": self.hashes[".tokens"],
            "documents_sha256": self.hashes[".documents"],
            "rows_sha256": self.hashes[".rows"],
        }
