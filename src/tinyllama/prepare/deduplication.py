"""Deduplication: search for documents that repeat an earlier document, exactly or nearly (MinHash).

The first stage of each kind (exact, MinHash) reads documents and writes their signatures. The last stage writes the
sorted ids of the documents to drop to `duplicates/*.npy`. A document's id is task * 2^32 + number. Of each group of
duplicates, the document with the lowest id is kept.
datatrove computes and compares MinHash signatures. This module selects the documents to keep. datatrove would keep the
document with the lowest number, regardless of its task, or a document in the middle of a chain of pairs. If a task runs
again, it replaces its files.
"""

import hashlib
import resource
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray

from tinyllama.errors import InputError
from tinyllama.files import atomic_write, fsync_path
from tinyllama.prepare.decontamination import hashed_ngrams

EXACT_RANGES = 16
"""Number of hash ranges; one task compares the hashes of one range, which bounds the task's memory."""
MINHASH_BUCKETS = 14
"""Number of buckets, datatrove's default. With 8 hashes per bucket, two documents that share 80 % of their 5-grams are
found with a probability of 92 %."""
_MINHASH_NGRAMS = 8192
"""Number of n-grams that are hashed at a time; with 112 hashes each, they take 7 MB. Those of a book take gigabytes."""
_TASK_BITS = np.uint64(32)


def write_exact_signatures(folder: Path, ranks: Sequence[int], documents: Iterator[Document], rank: int) -> None:
    """Write the hashes of the documents of task `rank`, if `rank` is in `ranks`, the tasks to compare."""
    if rank in ranks:
        digests = (hashlib.blake2b(document.text.encode(), digest_size=8).digest() for document in documents)
        hashes = np.frombuffer(b"".join(digests), dtype="<u8")
        with atomic_write(folder / f"signatures/{rank:06d}.npy") as file:
            np.save(file, hashes)


def find_exact_duplicates(folder: Path, ranks: Sequence[int], documents: Iterator[Document], rank: int) -> None:
    """Write the ids of the repeated documents whose hashes are in range `rank` of EXACT_RANGES."""
    hashes, ids = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for task in ranks:
        own = np.load(folder / f"signatures/{task:06d}.npy")
        numbers = np.flatnonzero(own >> np.uint64(60) == rank)
        hashes.append(own[numbers])
        ids.append(numbers.astype(np.uint64) | np.uint64(task) << _TASK_BITS)
    all_hashes, all_ids = np.concatenate(hashes), np.concatenate(ids)
    order = np.argsort(all_hashes, kind="stable")  # of equal hashes, the lowest id comes first
    repeated = all_hashes[order[1:]] == all_hashes[order[:-1]]
    _write_duplicates(folder, rank, np.sort(all_ids[order[1:][repeated]]))


def _write_duplicates(folder: Path, part: int, ids: NDArray[np.uint64]) -> None:
    with atomic_write(folder / f"duplicates/{part:05d}.npy") as file:
        np.save(file, ids)


def read_duplicates(folder: Path, task: int) -> set[int]:
    """Return the numbers of a task's documents that repeat an earlier document."""
    found: set[int] = set()
    for path in (folder / "duplicates").glob("*.npy"):
        ids = np.load(path, mmap_mode="r")
        first, last = np.searchsorted(ids, np.array([task, task + 1], np.uint64) << _TASK_BITS)
        found.update((ids[first:last] & np.uint64(0xFFFFFFFF)).tolist())
    return found


def sign_minhash(folder: Path, languages: Sequence[str | None], documents: Iterator[Document], rank: int) -> None:
    """Write the MinHash signatures of the documents of task `rank`; do nothing if `languages[rank]` is None.

    Documents are split into words by the rules of the language `languages[rank]`.
    """
    from datatrove.pipeline.dedup import MinhashDedupSignature  # noqa: PLC0415 - as below, part of the extra `clean`

    language = languages[rank]
    if language is None:
        return
    config = _minhash_config()
    step = MinhashDedupSignature(str(folder / "signatures"), config, language)
    # These replacements of two of datatrove's methods return the same numbers, but use less memory.
    step.get_shingles = lambda text: hashed_ngrams(text, language, config.n_grams).reshape(-1, 1)
    step.get_signature = partial(_signature_in_parts, step.get_signature)
    step.run(documents, rank, len(languages))
    _flush((folder / "signatures").glob(f"*/{rank:05d}.*"))


def _minhash_config() -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig  # noqa: PLC0415
    from datatrove.utils.hashing import HashConfig  # noqa: PLC0415

    return MinhashConfig(num_buckets=MINHASH_BUCKETS, hash_config=HashConfig(hash_fc="sha1"))


def _signature_in_parts(get_signature: Any, ngrams: NDArray[np.uint64]) -> list[list[int]]:
    """Return a document's signature, which has the minimum of each hash over the n-grams, computed part by part."""
    starts = range(0, len(ngrams), _MINHASH_NGRAMS)
    parts = [get_signature(ngrams[start : start + _MINHASH_NGRAMS]) for start in starts]
    signature: list[list[int]] = np.array(parts, dtype=np.uint64).min(axis=0).tolist()
    return signature


def find_minhash_pairs(folder: Path, documents: Iterator[Document], rank: int) -> None:
    """Write the pairs of documents with equal signatures in bucket `rank` of MINHASH_BUCKETS."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets  # noqa: PLC0415

    _allow_open_files(folder / f"signatures/bucket_{rank:03d}")
    step = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=_minhash_config())
    step.run(None, rank, MINHASH_BUCKETS)
    _flush((folder / "pairs").glob(f"{rank:05d}_*"))


def find_minhash_duplicates(folder: Path, documents: Iterator[Document], rank: int) -> None:
    """Write the ids of all documents except the first document of each cluster of pairs."""
    _write_duplicates(folder, 0, duplicates_in_clusters(map(_read_pairs, sorted((folder / "pairs").glob("*.dups")))))


def _read_pairs(path: Path) -> NDArray[np.uint64]:
    """Return the ids of a bucket's pairs: [N, 2]."""
    fields = np.fromfile(path, dtype="<u4").reshape(-1, 4).astype(np.uint64)
    pairs: NDArray[np.uint64] = fields[:, 0::2] << _TASK_BITS | fields[:, 1::2]
    return pairs


def duplicates_in_clusters(parts: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Return all nodes except the lowest of each connected component of the pairs [N, 2], in ascending order.

    `parts` yields arrays of pairs. The memory holds one of these arrays at a time, and one pair per node found so far.
    """
    forest = np.empty((0, 2), dtype=np.uint64)
    for pairs in parts:
        forest = _connected_components(np.concatenate([forest, pairs]))
    duplicates: NDArray[np.uint64] = forest[forest[:, 0] != forest[:, 1], 0]
    return duplicates


def _connected_components(pairs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return each node in ascending order, and the lowest node of its component: [nodes, 2].

    This is union-find on arrays: link the roots of all pairs, then shorten all paths, until no pair has two roots.
    """
    nodes, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(pairs.shape)
    parents = np.arange(len(nodes))
    while True:
        roots = parents[ends]
        if (roots[:, 0] == roots[:, 1]).all():
            return np.stack([nodes, nodes[parents]], axis=1)
        np.minimum.at(parents, roots.max(axis=1), roots.min(axis=1))
        while (parents[parents] != parents).any():
            parents = parents[parents]


def _allow_open_files(signatures: Path) -> None:
    """Raise this process's limit on open files, because datatrove keeps the signature files of all tasks open."""
    needed = len(list(signatures.glob("*"))) + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(f"{signatures}: needs {needed} open files, but the limit is {hard}; raise ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _flush(paths: Iterable[Path]) -> None:
    """Flush datatrove's files to disk, so that a completion record that is written later never refers to lost data."""
    files = set(paths)
    for path in files | {file.parent for file in files}:
        fsync_path(path)
