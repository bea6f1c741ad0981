"""Where tokens come from: from a place in a split back to its documents, their input files and rows.

Reads a split's manifest and, of the shards beside it, the files of documents' ends and rows, as memory maps.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllama.data.store import CORRUPT_MESSAGE, Split, check_size
from tinyllama.errors import InputError


@dataclass(frozen=True)
class Document:
    """A document of a split and what it was made from."""

    number: int
    """Its place among the split's documents, counted from 0."""
    start: int
    """Its first token's place in the split."""
    tokens: int
    """Its length, markers included."""
    file: str
    """The input file."""
    sha256: str
    """Of the input file."""
    row: int
    """Its place in the input file, counted from 0."""


def find_documents(split: Split, numbers: Iterable[int]) -> Iterator[Document]:
    """Documents of a split by their numbers. Raises IndexError where there is no such one, InputError for damage."""
    inputs = [shard["inputs"] for shard in split.manifest["shards"]]
    firsts = _first_documents(split)
    for number in numbers:
        if not 0 <= number < firsts[-1]:
            raise IndexError(f"document {number} of {split.folder}, which has {firsts[-1]}")
        shard = bisect_right(firsts, number) - 1
        place = number - firsts[shard]
        ends = _read_u64(split, shard, ".documents")
        start = int(ends[place - 1]) if place else 0
        if not start <= ends[place] <= split.shards[shard].tokens:
            raise InputError(f"{_path(split, shard, '.documents')}: {CORRUPT_MESSAGE}")
        source = _input(inputs[shard], place)
        yield Document(
            number,
            split.ends[shard] + start,
            int(ends[place]) - start,
            source["path"],
            source["sha256"],
            int(_read_u64(split, shard, ".rows")[place]),
        )


def documents_between(split: Split, start: int, stop: int) -> Iterator[Document]:
    """The documents that have a token in [start, stop), in order."""
    numbers = range(_document_at(split, start), split.num_documents)
    return takewhile(lambda document: document.start < stop, find_documents(split, numbers))


def _document_at(split: Split, token: int) -> int:
    """The number of the document that a token is of."""
    shard = bisect_right(split.ends, token) - 1
    ends = _read_u64(split, shard, ".documents")
    return _first_documents(split)[shard] + int(np.searchsorted(ends, token - split.ends[shard], "right"))


def _first_documents(split: Split) -> list[int]:
    """The number of each shard's first document, and of all documents."""
    return list(accumulate((shard.documents for shard in split.shards), initial=0))


def _input(inputs: list[dict[str, Any]], place: int) -> dict[str, Any]:
    """The input of a shard that its document `place` came from: documents stand in the order of the inputs."""
    ends = accumulate(entry["documents"] for entry in inputs)
    return next(entry for entry, end in zip(inputs, ends, strict=True) if place < end)


def _read_u64(split: Split, shard: int, suffix: str) -> NDArray[np.uint64]:
    path = _path(split, shard, suffix)
    check_size(path, split.shards[shard].documents * 8)
    return np.memmap(path, "<u8", "r")


def _path(split: Split, shard: int, suffix: str) -> Path:
    return (split.folder / split.shards[shard].file).with_suffix(suffix)
