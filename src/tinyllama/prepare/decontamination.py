"""Decontamination: search for documents that share n consecutive words with an evaluation item.

This module reads lm-eval's tasks and writes one index per source: the sorted hashes of the n-grams of all items, and
for each n-gram the index of its item. datatrove splits text into words, but its indexer and filter are not used.
datatrove's indexer needs lighteval. datatrove's filter stops at the first match of a document and stores one task per
hash. This module finds all matches, so that it can count the affected items of each task. The hash is the first 64 bits
of SHA-1, because datatrove's other hash requires an old version of xxhash.
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
from tinyllama.recipe import Cleaning

# Labels of an item's parts in lm-eval's prompts; web pages with the item's text usually lack these labels.
_LABELS = re.compile(r"^(?:question|answer|passage|context|q|a):", re.IGNORECASE | re.MULTILINE)
_PART_CHARACTERS = 1_000_000
"""Number of characters that are split into words at a time; a complete document of 200 MB would need gigabytes."""
_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class Index:
    """Index of the n-grams of a source's evaluation items; the items of all tasks are numbered consecutively from 0."""

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


def write_index(wanted: Sequence[tuple[str, Cleaning]], folder: Path, documents: Iterator[Document], rank: int) -> None:
    """Write the index of the source `wanted[rank]` to `folder`, as task `rank` of a cleaning stage.

    Raises InputError if lm-eval does not know an evaluation task, or if the task's items are neither on this machine
    nor on the hub.
    """
    source, cleaning = wanted[rank]
    try:
        texts = item_texts(cleaning.decontaminate)
    except InputError as error:
        raise InputError(f"data.sources.{source}.clean.decontaminate: {error}") from None
    index = build_index(texts, cleaning.language, cleaning.decontamination_words)
    with atomic_write(folder / f"{source}.npz") as file:
        np.savez(file, **vars(index))


def read_index(folder: Path, source: str) -> Index:
    """Read the index of a source."""
    with np.load(folder / f"{source}.npz") as arrays:
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


def build_index(texts: Mapping[str, Sequence[str]], language: str, length_words: int) -> Index:
    """Build the index of n-grams from the texts of the items of each task."""
    grams = [np.unique(hashed_ngrams(text, language, length_words)) for items in texts.values() for text in items]
    starts = np.cumsum([0, *map(len, texts.values())])
    is_short = np.array([not len(own) for own in grams], dtype=np.int64)
    hashes = np.concatenate([*grams, np.empty(0, dtype=np.uint64)])
    items = np.repeat(np.arange(len(grams)), [len(own) for own in grams])
    order = np.argsort(hashes, kind="stable")
    too_short = np.array([is_short[start:end].sum() for start, end in pairwise(starts)])
    return Index(hashes[order], items[order], np.array(list(texts), dtype=np.str_), starts, too_short)


def matching_items(index: Index, ngrams: NDArray[np.uint64]) -> dict[str, list[int]]:
    """Return, by task, the items that share a hashed n-gram with a document; a task's items are numbered from 0."""
    first, last = (np.searchsorted(index.hashes, ngrams, side) for side in ("left", "right"))
    hits = zip(first[last > first].tolist(), last[last > first].tolist(), strict=True)
    items = sorted({item for start, end in hits for item in index.items[start:end].tolist()})
    found: dict[str, list[int]] = {}
    for item in items:
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


def hashed_ngrams(text: str, language: str, length_words: int) -> NDArray[np.uint64]:
    """Return the hash of each n-gram of `length_words` words, in order: uint64[words - length_words + 1]."""
    from datatrove.utils.hashes.sha1 import sha1_hash64  # noqa: PLC0415 - as below, part of the extra `clean`
    from datatrove.utils.text import ngrams  # noqa: PLC0415

    grams = ngrams(words(text, language), length_words)
    return np.fromiter((sha1_hash64(" ".join(gram)) for gram in grams), dtype=np.uint64)


def words(text: str, language: str) -> Iterator[str]:
    """Yield the words of a text in lower case, without punctuation and accents, and with 0 in place of each number.

    Raises ValueError if the language has no rules, ImportError if the rules need a package that is not installed.
    """
    from datatrove.utils.text import simplify_text  # noqa: PLC0415
    from datatrove.utils.word_tokenizers import load_word_tokenizer  # noqa: PLC0415

    tokenizer = load_word_tokenizer(language)
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + _PART_CHARACTERS)  # no word contains a space
        end = space.start() if space else len(text)
        yield from tokenizer.word_tokenize(simplify_text(text[start:end]))
        start = end
