"""Documents to a token store, as a datatrove pipeline.

Reads the sources' files, writes the store. A task is a run of a source's files, about 64 MiB of them, fixed by the
recipe; it writes its own shard and then a receipt. Workers only take tasks, so they never change the bytes, and a task
with a receipt is never done again.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import multiprocess
import orjson
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger

from tinyllama.data.shards import ShardWriter
from tinyllama.data.sources import InputFile, Reject, list_files, read_rows
from tinyllama.data.store import FORMAT_VERSION, WORK, TokenStore
from tinyllama.errors import InputError
from tinyllama.files import alone_in, read_json, sha256_of, write_atomically, write_json
from tinyllama.progress import track_count
from tinyllama.recipe import Recipe, flatten
from tinyllama.recipe_data import Source
from tinyllama.tokenizer import Tokenizer

_TASK_BYTES = 64 << 20
_HELD_OUT = "held out for validation"

# datatrove announces every task on standard error, in every worker; here the progress bar does.
logger.disable("datatrove")


@dataclass(frozen=True)
class Task:
    """Files whose documents become one shard of a split."""

    source: str
    split: str
    number: int
    """Of the shard."""
    files: tuple[str, ...]
    holdout: float
    """Share of documents that go to validation instead."""


@dataclass
class Ledger:
    """What became of a task's rows; the reader fills it, the writer signs it."""

    read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    rejects: list[bytes] = field(default_factory=list)


def prepare(recipe: Recipe) -> TokenStore:
    """Write the recipe's token store, going on where an interrupted run stopped, and open it.

    Raises InputError where a file cannot be read, a source has no documents, or the store was made from other data.
    """
    store = Path(recipe.data.store)
    tokenizer = Tokenizer.load(recipe.tokenizer)
    tasks = [task for name, source in recipe.data.sources.items() for task in _tasks(name, source, recipe)]
    plan = {"settings": _settings(recipe, tokenizer), "inputs": _inputs(tasks)}
    with alone_in(store.parent, f"{store.name}.lock", f"{store}: another process is preparing this store"):
        if (store / "manifest.json").is_file():
            _same_or_refuse(store, plan)
        else:
            _begin(store, plan)
            _forget_changed(recipe, tasks)
            _run(recipe, tasks)
            _finish(store, recipe, tasks, plan)
    return TokenStore.open(store)


def _tasks(name: str, source: Source, recipe: Recipe) -> Iterator[Task]:
    files = list_files(name, source)
    holdout = 0.0 if any(file.split == "validation" for file in files) else recipe.data.holdout
    for split in ("train", "validation"):
        for number, group in enumerate(_groups([file for file in files if file.split == split])):
            yield Task(name, split, number, group, holdout)


def _groups(files: list[InputFile]) -> Iterator[tuple[str, ...]]:
    group: list[str] = []
    size = 0
    for file in files:
        group.append(str(file.path))
        size += file.path.stat().st_size
        if size >= _TASK_BYTES:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def _settings(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the bytes depend on besides the inputs, as it stands in the manifest."""
    sources = {
        name: source.model_dump(mode="json", exclude={"path", "weight"}) for name, source in recipe.data.sources.items()
    }
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
        "document": recipe.data.document.model_dump(),
        "holdout": recipe.data.holdout,
        "dtype": tokenizer.dtype.newbyteorder("<").str,
        "sources": sources,
    }


def _inputs(tasks: list[Task]) -> dict[str, int]:
    return {file: Path(file).stat().st_size for task in tasks for file in task.files}


def _same_or_refuse(store: Path, plan: dict[str, Any]) -> None:
    found = read_json(store / "manifest.json")
    for fields in found["sources"].values():
        del fields["splits"]
    inputs = found.pop("inputs")
    then, now = dict(flatten(found)), dict(flatten(plan["settings"]))
    for key in sorted(then | now):
        if then.get(key) != now.get(key):
            raise InputError(
                f"{store}: made with {key} {then.get(key)}, the recipe says {now.get(key)}; choose another store"
            )
    if inputs != plan["inputs"]:
        changed = sorted(dict(inputs.items() ^ plan["inputs"].items()))[0]
        raise InputError(f"{store}: {changed} has changed, come or gone since it was made; choose another store")
    for split in TokenStore.open(store).splits.values():
        for shard in split.manifest["shards"]:
            if changed := changed_since(store / "manifest.json", shard["inputs"]):
                raise InputError(f"{store}: {changed} has changed since it was made; choose another store")


def changed_since(record: Path, inputs: list[dict[str, Any]]) -> str | None:
    """The first input written after `record` whose bytes are not the recorded ones any more; None where all are."""
    written = record.stat().st_mtime
    for entry in inputs:
        path = Path(entry["path"])
        if path.stat().st_mtime >= written and sha256_of(path) != entry["sha256"]:
            return str(entry["path"])
    return None


def _forget_changed(recipe: Recipe, tasks: list[Task]) -> None:
    """Have a task done again whose files have changed since an interrupted run did it."""
    for rank in range(len(tasks)):
        receipt = _receipt(recipe, rank)
        if receipt.is_file() and changed_since(receipt, read_json(receipt)["inputs"]):
            receipt.unlink()


def _begin(store: Path, plan: dict[str, Any]) -> None:
    """Lay down the plan; keep what an interrupted run of the same plan finished, and clear away the rest."""
    work = store / WORK
    begun = read_json(work / "plan.json") if (work / "plan.json").is_file() else None
    if begun == plan:
        (work / "failure").unlink(missing_ok=True)
        for half_written in store.rglob("*.part"):
            half_written.unlink()
        return
    if work.exists():
        for name in begun["settings"]["sources"] if begun else ():
            shutil.rmtree(store / name, ignore_errors=True)
        shutil.rmtree(work)
    elif store.exists() and any(store.iterdir()):
        raise InputError(f"{store}: holds files but no token store; choose an empty or a new folder")
    write_json(work / "plan.json", plan)


def _run(recipe: Recipe, tasks: list[Task]) -> None:
    store = Path(recipe.data.store)
    work = store / WORK
    workers = min(len(tasks), os.cpu_count() or 1) if recipe.data.workers == "auto" else recipe.data.workers
    ledger = Ledger()
    executor = LocalPipelineExecutor(
        pipeline=[partial(_read, recipe, tasks, ledger), partial(_write, recipe, tasks, ledger)],
        tasks=len(tasks),
        workers=workers,
        logging_dir=str(work / "log"),
        skip_completed=False,  # a receipt is the only proof of a finished task
    )
    os.register_at_fork(
        after_in_child=_die_with_parent
    )  # datatrove forks a process for its queue, and says nothing to it
    with track_count("preparing", len(tasks), "tasks", lambda: len(list(work.glob("receipt-*.json")))):
        executor.run()
    if (work / "failure").is_file():
        raise InputError((work / "failure").read_text(encoding="utf-8"))


def _receipt(recipe: Recipe, rank: int) -> Path:
    return Path(recipe.data.store) / WORK / f"receipt-{rank:06d}.json"


def _skipped(recipe: Recipe, rank: int) -> bool:
    return _receipt(recipe, rank).is_file() or (Path(recipe.data.store) / WORK / "failure").is_file()


def _read(recipe: Recipe, tasks: list[Task], ledger: Ledger, data: Any, rank: int, world: int) -> Iterator[Document]:
    """Pipeline step: the documents of task `rank`."""
    if multiprocess.parent_process() is not None:
        _die_with_parent()
    if _skipped(recipe, rank):
        return
    source = recipe.data.sources[tasks[rank].source]
    for file in tasks[rank].files:
        for row in read_rows(Path(file), source):
            ledger.read += 1
            if isinstance(row, Reject):
                ledger.left_out[row.reason] += 1
                if not row.counted_only:
                    ledger.rejects.append(orjson.dumps({"file": file, "row": row.row, "reason": row.reason}))
            else:
                yield Document(text=row.text, id=f"{file}:{row.row}")


def _die_with_parent() -> None:
    """On Linux, have the kernel end this process once its parent is gone: none works on beside the next run."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG, see prctl(2)


def _write(recipe: Recipe, tasks: list[Task], ledger: Ledger, data: Iterator[Document], rank: int, world: int) -> None:
    """Pipeline step: the shards of task `rank`, then its receipt. A user's mistake is kept for the main process."""
    if _skipped(recipe, rank):
        return
    task = tasks[rank]
    try:
        shards = _write_shards(recipe, task, ledger, data)
        write_json(
            _receipt(recipe, rank),
            {
                "inputs": [
                    {"path": file, "bytes": _size(file), "sha256": sha256_of(Path(file))} for file in task.files
                ],
                "read": ledger.read,
                "left_out": dict(sorted(ledger.left_out.items())),
                "rejects": [row.decode() for row in ledger.rejects],
                "shards": shards,
            },
        )
    except (InputError, OSError) as error:
        with write_atomically(Path(recipe.data.store) / WORK / "failure") as file:
            advice = "" if isinstance(error, InputError) else f"{recipe.data.store}: run prepare again once mended: "
            file.write(f"{advice}{error}".encode())


def _size(file: str) -> int:
    return Path(file).stat().st_size


def _write_shards(recipe: Recipe, task: Task, ledger: Ledger, data: Iterator[Document]) -> dict[str, Any]:
    folder = Path(recipe.data.store) / task.source
    markers = recipe.data.document
    tokenizer = _tokenizer(recipe.tokenizer)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(folder / split, task.number))
            for split in ([task.split, "validation"] if task.holdout else [task.split])
        }
        while batch := list(islice(data, 256)):
            texts: dict[str, list[str]] = {split: [] for split in writers}
            for document in batch:
                texts["validation" if _held_out(document.text, task.holdout) else task.split].append(document.text)
            for split, kept in texts.items():
                for tokens in tokenizer.encode_documents(kept, markers.start, markers.end):
                    writers[split].write(tokens)
    if task.holdout:
        ledger.left_out[_HELD_OUT] = writers["validation"].documents
    return {split: writer.entry() for split, writer in writers.items() if writer.documents}


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(path)


def _held_out(text: str, share: float) -> bool:
    """Whether a document is for validation: by its content alone, so that its copies fall on the same side."""
    if not share:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _finish(store: Path, recipe: Recipe, tasks: list[Task], plan: dict[str, Any]) -> None:
    """Write the manifests, the store's own last of all."""
    receipts = [(task, read_json(_receipt(recipe, rank))) for rank, task in enumerate(tasks)]
    manifest = {**plan["settings"], "inputs": plan["inputs"]}
    for name in recipe.data.sources:
        own = [(task, receipt) for task, receipt in receipts if task.source == name]
        splits = {}
        for split in ("train", "validation"):
            if entry := _finish_split(store / name / split, split, own):
                splits[split] = entry
        if "train" not in splits:
            reasons = sum((Counter(receipt["left_out"]) for _, receipt in own), Counter())
            raise InputError(f"data.sources.{name}: no document left to train on ({_spell(reasons)}); see its path")
        manifest["sources"][name] = {**manifest["sources"][name], "splits": splits}
    write_json(store / "manifest.json", manifest)
    shutil.rmtree(store / WORK)


def _finish_split(folder: Path, split: str, own: list[tuple[Task, dict[str, Any]]]) -> dict[str, Any] | None:
    """Write one split's rejects and manifest; return its entry in the store's, None where it is empty."""
    shards = [
        {**receipt["shards"][split], "inputs": receipt["inputs"]} for _, receipt in own if split in receipt["shards"]
    ]
    if not shards:
        return None
    read = [receipt for task, receipt in own if task.split == split]
    tokens, documents = (sum(shard[key] for shard in shards) for key in ("tokens", "documents"))
    left_out = sum((Counter(receipt["left_out"]) for receipt in read), Counter())
    with write_atomically(folder / "rejects.jsonl") as file:
        file.writelines(f"{row}\n".encode() for receipt in read for row in receipt["rejects"])
    manifest = {
        "tokens": tokens,
        "documents": documents,
        # A validation split cut from the training files has read the documents that it holds, and no others.
        "rows": {
            "read": sum(receipt["read"] for receipt in read) or documents,
            "kept": documents,
            "left_out": dict(sorted(left_out.items())),
        },
        "rejects_sha256": sha256_of(folder / "rejects.jsonl"),
        "shards": shards,
    }
    write_json(folder / "manifest.json", manifest)
    return {"tokens": tokens, "documents": documents, "manifest_sha256": sha256_of(folder / "manifest.json")}


def _spell(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} rows {reason}" for reason, count in reasons.items()) or "no rows at all"
