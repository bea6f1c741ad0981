"""Decontamination: search for documents that share n consecutive words with an evaluation item.

This module reads lm-eval's tasks and writes one index per list of tasks and length n, which sources with the same list
share: the sorted hashes of the n-grams of all items, and for each n-gram the index of its item. The index is kept with
the unfinished work of one store only, so that it never belongs to other items than those of the installed tasks.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray

from tinyllama.errors import InputError
from tinyllama.evaluate.items import OFFLINE_TASKS
from tinyllama.files import atomic_write
from tinyllama.prepare.block_lists import index_name
from tinyllama.prepare.ngrams import hashed_ngrams
from tinyllama.recipe import Cleaning

# Labels of an item's parts in lm-eval's prompts; web pages with the item's text usually lack these labels.
_LABELS = re.compile(r"^(?:question|answer|passage|context|q|a):", re.IGNORECASE | re.MULTILINE)
_FILTER_BITS = 24
"""Number of upper bits of a hash that select an entry of the filter, which takes 2^24 bytes."""


@dataclass(frozen=True)
class Index:
    """Index of the n-grams of evaluation items; the items of all tasks are numbered consecutively from 0."""

    hashes: NDArray[np.uint64]
    """Hashes of the n-grams in ascending order: [N]."""
    items: NDArray[np.int64]
    """Index of the item that contains each n-gram: [N]."""
    tasks: NDArray[np.str_]
    """Names of the tasks: [T]."""
    starts: NDArray[np.int64]
    """Index of each task's first item, followed by the total number of items: [T + 1]."""
    too_short: NDArray[np.int64]
    """Number of each task's items with fewer than n words, which no document can match: [T]."""

    @cached_property
    def filter(self) -> NDArray[np.bool_]:
        """Whether the index has a hash with the given upper bits: [2^24]; this is faster than a search for a hash."""
        found = np.zeros(1 << _FILTER_BITS, np.bool_)
        found[self.hashes >> np.uint64(64 - _FILTER_BITS)] = True
        return found


def check_tasks(tasks: Sequence[str], place: str) -> None:
    """Raise InputError with the field's `place` if lm-eval does not know an evaluation task."""
    if OFFLINE_TASKS.keys() >= set(tasks):
        return
    from tinyllama.evaluate.tasks import check_task_names  # noqa: PLC0415 - lm-eval, 5 s and an extra

    try:
        check_task_names(tasks)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def wanted_indexes(cleanings: Mapping[str, Cleaning]) -> list[tuple[str, Cleaning]]:
    """Return a source for each different index that the sources need."""
    sources = {_file_name(cleaning): (name, cleaning) for name, cleaning in cleanings.items() if cleaning.decontaminate}
    return list(sources.values())


def _file_name(cleaning: Cleaning) -> str:
    return f"{index_name(cleaning.decontaminate, cleaning.decontamination_words)}.npz"


def write_index(wanted: Sequence[tuple[str, Cleaning]], folder: Path, documents: Iterator[Document], rank: int) -> None:
    """Write the index that the source `wanted[rank]` needs to `folder`, as task `rank` of a cleaning stage.

    Raises InputError if the items of a task are neither on this machine nor on the hub.
    """
    source, cleaning = wanted[rank]
    try:
        texts = item_texts(cleaning.decontaminate)
    except InputError as error:
        raise InputError(f"data.sources.{source}.clean.decontaminate: {error}") from None
    index = build_index(texts, cleaning.decontamination_words)
    with atomic_write(folder / _file_name(cleaning)) as file:
        np.savez(file, **vars(index))


def read_index(folder: Path, cleaning: Cleaning) -> Index:
    """Read the index for a source's cleaning."""
    with np.load(folder / _file_name(cleaning)) as arrays:
        return Index(**arrays)


def item_texts(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Return the text of each item by task: query and correct answer, without labels such as `Question:`."""
    from tinyllama.evaluate.tasks import load_tasks, suppress_stderr  # noqa: PLC0415 - lm-eval, 5 s and an extra

    loaded = load_tasks(tasks).tasks
    with suppress_stderr():
        return {name: [_item_text(task, item) for item in task.eval_docs] for name, task in loaded.items()}


def _item_text(task: Any, item: Any) -> str:
    choices = task.doc_to_choice(item) if task.OUTPUT_TYPE == "multiple_choice" else []
    # For some items, lm-eval returns the index of a choice instead of text: in WinoGrande for the query, otherwise
    # usually for the answer.
    query, answer = (_choice_text(part, choices) for part in (task.doc_to_text(item), task.doc_to_target(item)))
    return f"{_LABELS.sub('', query).strip()} {answer}"


def _choice_text(part: Any, choices: Sequence[str]) -> str:
    if isinstance(part, list):
        return " ".join(_choice_text(one, choices) for one in part)
    if isinstance(part, int):
        return choices[part] if 0 <= part < len(choices) else ""
    return str(part)


def build_index(texts: Mapping[str, Sequence[str]], length_words: int) -> Index:
    """Build the index of n-grams from the texts of the items of each task."""
    grams = [
        np.unique(np.concatenate([np.empty(0, np.uint64), *hashed_ngrams(text, length_words)]))
        for items in texts.values()
        for text in items
    ]
    starts = np.cumsum([0, *map(len, texts.values())])
    is_short = np.array([not len(own) for own in grams], dtype=np.int64)
    hashes = np.concatenate([*grams, np.empty(0, dtype=np.uint64)])
    items = np.repeat(np.arange(len(grams)), [len(own) for own in grams])
    order = np.argsort(hashes, kind="stable")
    too_short = np.array([is_short[start:end].sum() for start, end in pairwise(starts)])
    return Index(hashes[order], items[order], np.array(list(texts), dtype=np.str_), starts, too_short)


def matching_items(index: Index, text: str, length_words: int) -> dict[str, list[int]]:
    """Return, by task, the items that share an n-gram with a text; a task's items are numbered from 0."""
    matches: set[int] = set()
    for ngrams in hashed_ngrams(text, length_words):
        candidates = ngrams[index.filter[ngrams >> np.uint64(64 - _FILTER_BITS)]]
        if not len(candidates):
            continue
        first, last = (np.searchsorted(index.hashes, candidates, side) for side in ("left", "right"))
        for start, end in zip(first.tolist(), last.tolist(), strict=True):
            matches.update(index.items[start:end].tolist())
    found: dict[str, list[int]] = {}
    for item in sorted(matches):
        task = int(np.searchsorted(index.starts, item, "right")) - 1
        found.setdefault(str(index.tasks[task]), []).append(item - int(index.starts[task]))
    return found


def overlap(index: Index, dropped: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, dict[str, int]]:
    """Return counts for each task.

    The counts are all `items`, the items that are `too_short` for an n-gram, the items `found` in documents, and the
    `documents` that were dropped because of an item.

    `dropped` lists the matching items of each dropped document.
    """
    tasks: list[str] = index.tasks.tolist()
    found: dict[str, set[int]] = {task: set() for task in tasks}
    documents = dict.fromkeys(tasks, 0)
    for matches in dropped:
        for task, items in matches.items():
            found[task].update(items)
            documents[task] += 1
    counts = zip(tasks, np.diff(index.starts).tolist(), index.too_short.tolist(), strict=True)
    return {
        task: {"items": items, "too_short": short, "found": len(found[task]), "documents": documents[task]}
        for task, items, short in counts
    }
