"""Deduplication: search for documents that repeat an earlier document, exactly or nearly (MinHash).

Three stages run for each kind (exact, MinHash). The first stage reads documents and writes keys, which are equal for
duplicates: one hash of the text, or one hash per band of the MinHash signature. The second stage searches for equal
keys, one range of keys per task. The third stage joins the pairs to clusters. The first document of each cluster is
kept. If a task runs again, it replaces its files.

A document has an index among the documents of all tasks. Memory per task is bounded, except for a few bytes per
document in the third stage.

Sources: A. Broder, "On the resemblance and containment of documents", 1997 (MinHash); J. Leskovec, A. Rajaraman and
J. Ullman, "Mining of Massive Datasets", chapter 3 (bands and rows).
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray

from tinyllama.files import atomic_write
from tinyllama.prepare.ngrams import MULTIPLIER, hashed_ngrams
from tinyllama.text import TextLike, hash_text, to_str

BANDS, ROWS = 24, 9
"""Number of bands of a signature, and of hash functions per band. Two documents share a key with the probability
1 - (1 - J^ROWS)^BANDS, where J is the Jaccard similarity of their sets of n-grams: 97 % for J = 0.8, 0.6 % for 0.4."""
NGRAM_WORDS = 5
KEY_RANGES = 16
"""Number of tasks that search for equal keys."""
_BLOCK_KEYS = 1 << 20
"""Approximate number of keys in a file of the first stage, which a task sorts in memory."""
_SEARCH_KEYS = 1 << 22
"""Approximate number of keys that a task of the second stage compares at a time; they take about 200 MB."""
_BATCH_NGRAMS = 1 << 15
"""Number of n-grams whose minimum hashes are computed at a time, which fit into a core's cache."""
_CLUSTER_DOCUMENTS = 1 << 22
"""Number of documents whose clusters are resolved at a time."""

Keys = tuple[NDArray[np.integer[Any]], NDArray[np.unsignedinteger[Any]]]
"""Two arrays of equal length: the numbers or indexes of documents, and their keys."""


class Place(NamedTuple):
    """Place of a document in the input."""

    task: int
    file: int
    """Index of the file among the files of the task."""
    row: int


def write_keys(folder: Path, kind: Literal["exact", "minhash"], documents: Iterator[Document], rank: int) -> None:
    """Write the keys and places of the documents of task `rank`."""
    places = array("Q")

    def texts() -> Iterator[TextLike]:
        for document in documents:
            places.extend((document.metadata["input"], document.metadata["row"]))
            yield document.text

    for old in (folder / "keys").glob(f"{rank:06d}-*"):
        old.unlink()
    for block, parts in enumerate(_batches(_KEYS_OF[kind](texts()), _BLOCK_KEYS)):
        numbers, keys = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.argsort(keys, kind="stable")
        with atomic_write(folder / f"keys/{rank:06d}-{block:06d}") as file:
            file.write(keys[order].astype("<u8").tobytes())
            file.write(numbers[order].astype("<u4").tobytes())
    with atomic_write(folder / f"places/{rank:06d}") as file:
        file.write(np.array(places, dtype="<u8").tobytes())


def _batches(items: Iterator[Keys], length: int) -> Iterator[list[Keys]]:
    """Yield consecutive items, so many at a time that their arrays together have at least `length` members."""
    batch: list[Keys] = []
    total = 0
    for item in items:
        batch.append(item)
        total += len(item[1])
        if total >= length:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def exact_keys(texts: Iterator[TextLike]) -> Iterator[Keys]:
    """Yield the numbers of documents, and the 64-bit BLAKE2b hash of each text."""
    digests = map(hash_text, texts)
    first = 0
    while data := b"".join(islice(digests, 4096)):
        keys = np.frombuffer(data, "<u8")
        yield np.arange(first, first + len(keys), dtype=np.uint32), keys
        first += len(keys)


def minhash_keys(texts: Iterator[TextLike]) -> Iterator[Keys]:
    """Yield the numbers of documents and the keys of their bands; a text with fewer than NGRAM_WORDS words has none."""
    last, last_minima = np.empty(0, np.int64), np.empty((BANDS * ROWS, 0), np.uint32)
    for batch in _batches(_ngrams_in_parts(texts), _BATCH_NGRAMS):
        numbers, ngrams = (np.concatenate(part) for part in zip(*batch, strict=True))
        starts = np.cumsum([0, *(len(part) for _, part in batch[:-1])])
        numbers = np.concatenate([last, numbers])
        minima = np.concatenate([last_minima, minimum_hashes(ngrams, starts)], axis=1)
        numbers, firsts = np.unique(numbers, return_index=True)
        minima = np.minimum.reduceat(minima, firsts, axis=1)
        yield np.repeat(numbers[:-1], BANDS), band_keys(minima[:, :-1]).ravel()
        last, last_minima = numbers[-1:], minima[:, -1:]  # the next batch may have more parts of the last document
    if len(last):
        yield np.repeat(last, BANDS), band_keys(last_minima).ravel()


def _ngrams_in_parts(texts: Iterator[TextLike]) -> Iterator[Keys]:
    """Yield the number of each document, and the upper 32 bits of the hashes of its n-grams, in one or more parts."""
    for number, text in enumerate(texts):
        for ngrams in hashed_ngrams(to_str(text), NGRAM_WORDS):
            if len(ngrams):
                yield np.array([number]), (ngrams >> np.uint64(32)).astype(np.uint32)


def minimum_hashes(ngrams: NDArray[np.uint32], starts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return each document's minimum of each hash function over its n-grams: [BANDS x ROWS, documents].

    `ngrams` has the hashed n-grams of all documents, and `starts` the index of each document's first n-gram. The hash
    functions are x -> a x + b modulo 2^32, which are permutations because a is odd.
    """
    blocks = np.arange(0, len(ngrams), _BATCH_NGRAMS)
    cuts = np.union1d(starts, blocks)
    minima = np.empty((len(_FACTORS), len(cuts)), np.uint32)
    for block in blocks:
        own = ngrams[block : block + _BATCH_NGRAMS]
        first, last = np.searchsorted(cuts, (block, block + len(own)))
        hashes = np.empty_like(own)
        for row, (factor, summand) in enumerate(zip(_FACTORS, _SUMMANDS, strict=True)):
            np.multiply(own, factor, out=hashes)
            np.add(hashes, summand, out=hashes)
            np.minimum.reduceat(hashes, cuts[first:last] - block, out=minima[row, first:last])
    return np.minimum.reduceat(minima, np.searchsorted(cuts, starts), axis=1)


# Random bytes of a hash function, since numpy's generators may change between versions.
_FACTORS, _SUMMANDS = np.frombuffer(hashlib.shake_128(b"minhash").digest(8 * BANDS * ROWS), "<u4").reshape(2, -1)
_FACTORS = _FACTORS | np.uint32(1)


def band_keys(minima: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return one key per document and band, from the minimum hashes [BANDS x ROWS, documents]: [documents, BANDS]."""
    keys = np.tile(np.arange(BANDS, dtype=np.uint64)[:, None], minima.shape[1])
    for row in minima.reshape(BANDS, ROWS, -1).transpose(1, 0, 2):
        keys = (keys + row) * MULTIPLIER
    return keys.T


_KEYS_OF: dict[str, Callable[[Iterator[TextLike]], Iterator[Keys]]] = {"exact": exact_keys, "minhash": minhash_keys}


def find_equal_keys(folder: Path, num_tasks: int, documents: Iterator[Document], rank: int) -> None:
    """Write the pairs of documents with an equal key in range `rank` of KEY_RANGES.

    A pair consists of a document and the first document with the same key. The task divides its range into parts, so
    that the keys in memory do not depend on the size of the input.
    """
    first_documents = _first_documents(folder, num_tasks)
    blocks = sorted((folder / "keys").glob("*"))
    total = sum(path.stat().st_size for path in blocks) // 12
    parts = 1 << (total // KEY_RANGES // _SEARCH_KEYS).bit_length()
    width = (1 << 64) // KEY_RANGES // parts
    for old in (folder / "pairs").glob(f"{rank:06d}-*"):
        old.unlink()
    for part in range(parts):
        start = (rank * parts + part) * width
        found: list[Keys] = [(np.empty(0, np.int64), np.empty(0, np.uint64))]
        found += (_read_range(path, first_documents, start, start + width - 1) for path in blocks)
        indexes, keys = (np.concatenate(column) for column in zip(*found, strict=True))
        with atomic_write(folder / f"pairs/{rank:06d}-{part:06d}.npy") as file:
            np.save(file, _repeated(indexes, keys))


def _first_documents(folder: Path, num_tasks: int) -> NDArray[np.int64]:
    """Return the index of each task's first document, followed by the number of all documents: [num_tasks + 1]."""
    counts = [0] * num_tasks
    for path in (folder / "places").glob("*"):
        counts[int(path.name)] = path.stat().st_size // 16
    return np.cumsum([0, *counts])


def _read_range(path: Path, first_documents: NDArray[np.int64], first_key: int, last_key: int) -> Keys:
    """Return the documents and keys of a block whose keys are in a range; the documents are indexes over all tasks."""
    count = path.stat().st_size // 12
    keys = np.memmap(path, "<u8", "r", shape=(count,))
    start = int(np.searchsorted(keys, np.uint64(first_key)))
    end = int(np.searchsorted(keys, np.uint64(last_key), "right"))
    numbers = np.fromfile(path, "<u4", end - start, offset=8 * count + 4 * start)
    return numbers + first_documents[int(path.name.partition("-")[0])], np.array(keys[start:end])


def _repeated(documents: NDArray[Any], keys: NDArray[Any]) -> NDArray[Any]:
    """Return the documents with the key of an earlier one, and the first document with this key: [2, N]."""
    order = np.argsort(keys, kind="stable")  # of equal keys, the first document comes first
    documents, keys = documents[order], keys[order]
    is_new = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.empty(0, bool)
    firsts = documents[is_new][np.cumsum(is_new) - 1]
    return np.stack([documents, firsts])[:, ~is_new]


def find_clusters(folder: Path, num_tasks: int, documents: Iterator[Document], rank: int) -> None:
    """Write the first document of each document's cluster, and the index of each task's first document."""
    first_documents = _first_documents(folder, num_tasks)
    pairs = (np.load(path) for path in sorted((folder / "pairs").glob("*")))
    for name, values in (("first_documents", first_documents), ("kept", kept_documents(first_documents[-1], pairs))):
        with atomic_write(folder / f"{name}.npy") as file:
            np.save(file, values)


def kept_documents(count: int, parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Return the lowest document of each document's connected component: [count].

    `parts` yields arrays of pairs of documents, [2, N]. The memory holds one array at a time, and four bytes per
    document (eight from 2^32 documents on). This is union-find on arrays: link the roots of all pairs, until no pair
    has two roots.
    """
    parents = np.arange(count, dtype=np.min_scalar_type(max(0, count - 1)))
    for pairs in parts:
        while True:
            roots = _roots(parents, pairs)
            parents[pairs] = roots
            higher, lower = roots.max(axis=0), roots.min(axis=0)
            if (higher == lower).all():
                break
            np.minimum.at(parents, higher, lower)
    for start in range(0, count, _CLUSTER_DOCUMENTS):
        own = slice(start, start + _CLUSTER_DOCUMENTS)
        parents[own] = _roots(parents, parents[own])
    return parents


def _roots(parents: NDArray[Any], documents: NDArray[Any]) -> NDArray[Any]:
    roots: NDArray[Any] = parents[documents]
    while (parents[roots] != roots).any():
        roots = parents[roots]
    return roots


def read_duplicates(folder: Path, task: int) -> dict[int, Place]:
    """Return the numbers of a task's documents that repeat an earlier document, and the place of the kept document."""
    first_documents = np.load(folder / "first_documents.npy")
    first, end = first_documents[task : task + 2]
    kept = np.load(folder / "kept.npy", mmap_mode="r")[first:end].astype(np.int64)
    numbers = np.flatnonzero(kept != np.arange(first, end))
    kept = kept[numbers]
    tasks = np.searchsorted(first_documents, kept, "right") - 1
    found: dict[int, Place] = {}
    for other in np.unique(tasks).tolist():
        places = np.memmap(folder / f"places/{other:06d}", "<u8", "r").reshape(-1, 2)
        own = tasks == other
        rows = places[kept[own] - first_documents[other]].tolist()
        found |= {number: Place(other, *row) for number, row in zip(numbers[own].tolist(), rows, strict=True)}
    return found
