"""What one worker does with one task: rows to documents, cleaning, tokens, a shard, a receipt.

The steps are datatrove's kind, (data, rank, world) -> data, so its blocks stand between reading and writing. A task
ends with a receipt that holds the hashes of what it read and wrote; one that has a receipt is not done again.
"""

import errno
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import orjson
from datatrove.data import Document
from loguru import logger

from tinyllama.errors import InputError
from tinyllama.files import atomic_write, sha256_of, write_json
from tinyllama.prepare import cleaning
from tinyllama.prepare.decontamination import CONTAMINATED
from tinyllama.prepare.files import local_copy
from tinyllama.prepare.readers import FileCounts, RejectedRow, read_rows
from tinyllama.prepare.selection import hash_to_unit_interval, split_tail
from tinyllama.prepare.shards import ShardWriter
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
_REJECTS_BYTES = 1 << 28
"""Largest size of a task's list of rejects; later ones are only counted."""
_REPAIRED = "lone surrogates became U+FFFD"

# datatrove announces every task on standard error, in every worker; here the progress bar does.
logger.disable("datatrove")


@dataclass
class DocumentCounts:
    """Documents of a subset: how many, how long."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass
class TaskStats:
    """What became of a task's rows; reading and cleaning fill it, the receipt holds it."""

    read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    """Number of rows that are used with a change, by reason."""
    doubts: list[dict[str, Any]] = field(default_factory=list)
    """See `FileCounts.warnings`."""
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """Path, bytes and SHA-256 of each input, and the documents of it in each split."""
    contaminated: list[dict[str, list[int]]] = field(default_factory=list)
    """Of each document dropped for evaluation items: their numbers, by evaluation task."""
    subsets: dict[str, dict[str, DocumentCounts]] = field(default_factory=dict)
    """Tallies by split and subset."""

    def count(self, split: str, metadata: dict[str, Any], tokens: int, text_bytes: int) -> None:
        """Book a document that is written."""
        documents = self.inputs[metadata["input"]]["documents"]
        documents[split] = documents.get(split, 0) + 1
        tally = self.subsets.setdefault(split, {}).setdefault(metadata["subset"], DocumentCounts())
        tally.documents += 1
        tally.tokens += tokens
        tally.text_bytes += text_bytes

    def exclude(self, document: Document) -> None:
        """Book a document that cleaning takes out: by reason, and where it held evaluation items, which ones."""
        self.left_out[str(document.metadata["filter_reason"])] += 1
        if found := document.metadata.get(CONTAMINATED):
            self.contaminated.append(found)


def stages(job: Job) -> dict[str, int]:
    """Name and number of tasks of each stage, in the order in which they must be done; the last writes the tokens."""
    first = _preliminary(job, TaskStats())
    return {stage.name: stage.tasks for stage in first} | {TOKENS: len(job.tasks)}


def run_task(job: Job, stage: str, rank: int) -> None:
    """Do task `rank` of a stage, unless its receipt is there.

    Raises InputError where an input cannot be read or the store cannot be written.
    """
    if job.completion_record(stage, rank).is_file():
        return
    with translate_write_errors(job.store):
        receipt = _write_tokens(job, rank) if stage == TOKENS else _prepare_cleaning(job, stage, rank)
        write_json(job.completion_record(stage, rank), receipt)


@contextmanager
def translate_write_errors(store: Path) -> Iterator[None]:
    """Turn the want of room, rights or memory into one line; what is of an input has its own."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "remove the cause")
        raise InputError(
            f"{store}: cannot be written ({error.strerror or error}); {remedy} and run prepare again, "
            "which resumes from here"
        ) from None
    except MemoryError:
        raise InputError(
            f"{store}: a worker found no memory; run prepare again with fewer data.workers or more memory: it resumes "
            "from here"
        ) from None


def _prepare_cleaning(job: Job, stage: str, rank: int) -> dict[str, Any]:
    """A task of a stage that cleaning needs done before; its receipt."""
    ledger = TaskStats()
    (own,) = (one for one in _preliminary(job, ledger) if one.name == stage)
    data: Any = None
    for step in own.steps:
        data = step(data, rank, own.tasks)
    deque(data or (), maxlen=0)
    return {"inputs": ledger.inputs}


def _preliminary(job: Job, ledger: TaskStats) -> list[cleaning.CleaningStage]:
    def read(data: Any, rank: int, world: int) -> Iterator[Document]:
        return _documents(job, rank, ledger)

    return cleaning.cleaning_stages(job.recipe, [task.source for task in job.tasks], job.work, read)


def _documents(job: Job, rank: int, ledger: TaskStats) -> Iterator[Document]:
    """The usable rows of a task's files; the ledger has the others, the rejects' file those at fault."""
    task = job.tasks[rank]
    source = job.recipe.data.sources[task.source]
    is_cleaned = source.clean != Cleaning()
    with atomic_write(job.rejects_path(rank)) as rejects:
        for number, path in enumerate(task.files):
            entry: dict[str, Any] = {"path": path, "bytes": 0, "sha256": "", "documents": {}}
            ledger.inputs.append(entry)
            counts = FileCounts(path)
            with local_copy(path) as local:
                for row in read_rows(path, source, local, counts):
                    ledger.read += 1
                    if isinstance(row, RejectedRow):
                        _reject(ledger, rejects, path, row)
                    else:
                        if row.repaired:
                            ledger.changed[_REPAIRED] += 1
                        metadata = {"subset": row.subset, "input": number, "row": row.row}
                        text = to_str(row.text) if is_cleaned else row.text  # datatrove's blocks know strings alone
                        yield Document(text=text, id=f"{path}:{row.row}", metadata=metadata)
                entry |= {"bytes": local.stat().st_size, "sha256": sha256_of(local)}
            ledger.doubts += counts.warnings()


def _reject(ledger: TaskStats, rejects: IO[bytes], path: str, row: RejectedRow) -> None:
    ledger.left_out[row.reason] += 1
    if not row.is_intentional and rejects.tell() < _REJECTS_BYTES:
        place = {"file": path, "row": row.row} | ({"line": row.line} if row.line else {})
        rejects.write(orjson.dumps(place | {"reason": row.reason}) + b"\n")


def _write_tokens(job: Job, rank: int) -> dict[str, Any]:
    """The shards of a task; its receipt."""
    task, ledger = job.tasks[rank], TaskStats()
    data: Any = _documents(job, rank, ledger)
    for step in cleaning.steps(job.recipe, task.source, job.work, ledger.exclude):
        data = step(data, rank, len(job.tasks))
    splits = [task.split, "validation"] if task.holdout else [task.split]
    with ExitStack() as stack:
        folder = job.store / task.source
        writers = {split: stack.enter_context(ShardWriter(folder / split, task.number)) for split in splits}
        _tokenize(job, task, data, ledger, writers)
    if task.holdout:
        counts = ledger.changed if _splits_tails(job, task) else ledger.left_out
        counts[TAIL_HELD_OUT if _splits_tails(job, task) else HELD_OUT] = writers["validation"].documents
    return {
        "task": job.identity(rank),
        "inputs": ledger.inputs,
        "read": ledger.read,
        "left_out": dict(sorted(ledger.left_out.items())),
        "changed": dict(sorted(ledger.changed.items())),
        "doubts": ledger.doubts,
        "contaminated": ledger.contaminated,
        "subsets": {
            split: {name: vars(tally) for name, tally in sorted(own.items())} for split, own in ledger.subsets.items()
        },
        "shards": {split: writer.entry() for split, writer in writers.items() if writer.documents},
    }


def _tokenize(
    job: Job, task: Task, documents: Iterator[Document], ledger: TaskStats, writers: dict[str, ShardWriter]
) -> None:
    """Write each document's tokens to its split and book it; the tokenizer takes several documents at a time."""
    taken: deque[tuple[str, dict[str, Any], int]] = deque()

    def texts() -> Iterator[TextLike]:
        for document in documents:
            for split, text in _placed(job, task, document.text):
                taken.append((split, document.metadata, sum(map(len, iter_utf8_chunks(text)))))
                yield text

    markers = job.recipe.data.document
    for tokens in load_tokenizer(job.recipe.tokenizer).encode_documents(texts(), markers.bos, markers.eos):
        split, metadata, text_bytes = taken.popleft()
        writers[split].write(tokens, metadata["row"])
        ledger.count(split, metadata, len(tokens), text_bytes)


def _placed(job: Job, task: Task, text: TextLike) -> list[tuple[str, TextLike]]:
    """A document's split and text; where its end is held out, those of both parts."""
    if not task.holdout:
        return [(task.split, text)]
    if not _splits_tails(job, task):
        return [("validation" if hash_to_unit_interval(text) < task.holdout else task.split, text)]
    head, tail = split_tail(text, task.holdout)
    return [(task.split, head), ("validation", tail)] if tail else [(task.split, text)]


def _splits_tails(job: Job, task: Task) -> bool:
    return job.recipe.data.sources[task.source].holdout == "tail"


@lru_cache(maxsize=1)
def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer, loaded once a process: forked workers have it too, and the next task finds its memo full."""
    return Tokenizer.load(path)
