"""Documents that share a run of words with an evaluation task's item, and how many items were so found.

Reads lm-eval's tasks, writes for each source one index: the hash of every run of words of every item, sorted, beside
whose it is. datatrove's own indexer needs lighteval, and its filter stops at a document's first hit and knows one task
for a hash; here every hit counts, so that the overlap can be told item by item. Words and hashes are datatrove's.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray

from tinyllama.errors import InputError
from tinyllama.files import atomic_write
from tinyllama.prepare.dropping import DropCallback, drop_document
from tinyllama.prepare.ngrams import hashed_ngrams
from tinyllama.recipe import Cleaning

CONTAMINATED = "contaminated"
"""Of a document's metadata: what was found in it, numbers of items by task."""

# How lm-eval's prompts name an item's parts; no text of a web page would have them at these places.
_LABELS = re.compile(r"^(?:question|answer|passage|context|q|a):", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Index:
    """Runs of words of the tasks' items; items are counted through all tasks."""

    hashes: NDArray[np.uint64]
    """Of the runs, in rising order: [N]."""
    items: NDArray[np.int64]
    """Whose each run is: [N]."""
    tasks: NDArray[np.str_]
    """Names: [T]."""
    starts: NDArray[np.int64]
    """Each task's first item, and after them the number of all: [T + 1]."""
    too_short: NDArray[np.int64]
    """Each task's items of too few words, which no search can find: [T]."""


def write_indexes(wanted: Sequence[tuple[str, Cleaning]], folder: Path, data: None, rank: int, world: int) -> None:
    """Pipeline step: the index of source number `rank`.

    Raises InputError for a task that lm-eval does not know, and for items neither here nor on the hub.
    """
    source, cleaning = wanted[rank]
    try:
        texts = item_texts(cleaning.decontaminate)
    except InputError as error:
        raise InputError(f"data.sources.{source}.clean.decontaminate: {error}") from None
    index = build_index(texts, cleaning.language, cleaning.decontamination_words)
    with atomic_write(_path(folder, source)) as file:
        np.savez(file, **vars(index))


def _path(folder: Path, source: str) -> Path:
    return folder / f"{source}.npz"


def item_texts(tasks: Sequence[str]) -> dict[str, list[str]]:
    """By task, the text of each of its items: query and right answer, without a prompt's labels."""
    from tinyllama.evaluate.tasks import load_tasks, suppress_stderr  # noqa: PLC0415 - lm-eval, 5 s and an extra

    loaded = load_tasks(tasks).tasks
    with suppress_stderr():
        return {name: [_item_text(task, item) for item in task.eval_docs] for name, task in loaded.items()}


def _item_text(task: Any, item: Any) -> str:
    choices = task.doc_to_choice(item) if task.OUTPUT_TYPE == "multiple_choice" else []
    # Either may be the number of a choice: the answer usually, the query in tasks such as WinoGrande.
    query, answer = (_choice_text(part, choices) for part in (task.doc_to_text(item), task.doc_to_target(item)))
    return f"{_LABELS.sub('', query).strip()} {answer}"


def _choice_text(part: Any, choices: Sequence[str]) -> str:
    if isinstance(part, list):
        return " ".join(_choice_text(one, choices) for one in part)
    if isinstance(part, int):
        return choices[part] if 0 <= part < len(choices) else ""
    return str(part)


def build_index(texts: Mapping[str, Sequence[str]], language: str, length_words: int) -> Index:
    """The index of items' texts by task."""
    runs = [np.unique(hashed_ngrams(text, language, length_words)) for items in texts.values() for text in items]
    starts = np.cumsum([0, *map(len, texts.values())])
    short = np.array([not len(own) for own in runs], dtype=np.int64)
    hashes = np.concatenate([*runs, np.empty(0, dtype=np.uint64)])
    items = np.repeat(np.arange(len(runs)), [len(own) for own in runs])
    order = np.argsort(hashes, kind="stable")
    too_short = np.array([short[start:end].sum() for start, end in pairwise(starts)])
    return Index(hashes[order], items[order], np.array(list(texts), dtype=np.str_), starts, too_short)


def matching_items(index: Index, runs: NDArray[np.uint64]) -> dict[str, list[int]]:
    """The items that share one of the hashed runs with a document: their numbers, by task."""
    first, last = (np.searchsorted(index.hashes, runs, side) for side in ("left", "right"))
    hits = zip(first[last > first].tolist(), last[last > first].tolist(), strict=True)
    items = sorted({item for start, end in hits for item in index.items[start:end].tolist()})
    found: dict[str, list[int]] = {}
    for item in items:
        task = int(np.searchsorted(index.starts, item, "right")) - 1
        found.setdefault(str(index.tasks[task]), []).append(item - int(index.starts[task]))
    return found


def drop_contaminated(
    folder: Path,
    source: str,
    cleaning: Cleaning,
    on_excluded: DropCallback,
    data: Iterator[Document],
    rank: int,
    world: int,
) -> Iterator[Document]:
    """Pipeline step: the documents of a source that share no run of words with an item."""
    index = _read_index(_path(folder, source))
    for document in data:
        found = matching_items(index, hashed_ngrams(document.text, cleaning.language, cleaning.decontamination_words))
        if found:
            document.metadata[CONTAMINATED] = found
            drop_document(document, f"contaminated: {', '.join(found)}", on_excluded)
        else:
            yield document


def _read_index(path: Path) -> Index:
    with np.load(path) as arrays:
        return Index(**arrays)


def overlap(folder: Path, source: str, dropped: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, dict[str, int]]:
    """By task of a source: `items`, of them `too_short` to look for and `found`, and the `documents` dropped for them.

    `dropped` is each dropped document's `metadata[CONTAMINATED]`.
    """
    index = _read_index(_path(folder, source))
    tasks: list[str] = index.tasks.tolist()
    found: dict[str, set[int]] = {task: set() for task in tasks}
    documents = dict.fromkeys(tasks, 0)
    for one in dropped:
        for task, items in one.items():
            found[task].update(items)
            documents[task] += 1
    counts = zip(tasks, np.diff(index.starts).tolist(), index.too_short.tolist(), strict=True)
    return {
        task: {"items": items, "too_short": short, "found": len(found[task]), "documents": documents[task]}
        for task, items, short in counts
    }
