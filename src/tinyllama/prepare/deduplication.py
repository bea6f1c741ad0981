"""Duplicate documents among the tasks: which of them to leave out, exact or near (MinHash).

Reads documents, writes signatures, pairs and at last, under `duplicates/`, the numbers of each task's documents that
repeat an earlier one. datatrove signs and compares; which copy stays is decided here, for its own rules would keep the
lowest row number, whatever the task, or the middle of a chain. A rerun begins by clearing away what a rank left behind,
so that every file is a function of the documents alone.
"""

import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray

from tinyllama.errors import InputError
from tinyllama.files import atomic_write, fsync_path
from tinyllama.prepare.dropping import DropCallback, drop_document
from tinyllama.prepare.ngrams import hashed_ngrams

EXACT_FINDERS = 16
"""Ranges of the hashes, each compared by a task of its own."""
MINHASH_BUCKETS = 14
"""datatrove's: with 8 hashes each, documents that share 80 % of their 5-word runs are found with 92 %."""
_MOST_PRIORITIES = 65_535  # datatrove stores an order of precedence in 16 bits
_SIGNED_GRAMS = 8192  # 112 hashes of each at a time: 7 MB, where a book at once would take gigabytes


def write_exact_signatures(
    folder: Path, places: Sequence[int | None], data: Iterator[Document] | None, rank: int, world: int
) -> None:
    """Pipeline step: hashes of the texts of task `rank`, whose place among those that take part is `places[rank]`."""
    from datatrove.pipeline.dedup import ExactDedupSignature  # noqa: PLC0415 - as below, part of the extra `clean`

    place = places[rank]
    if place is None:
        return
    if place >= _MOST_PRIORITIES:
        raise InputError(
            f"clean.deduplicate: exact compares {_MOST_PRIORITIES} tasks of about 64 MiB at most, there are more; "
            "choose minhash"
        )
    _clear((folder / "signatures").glob(f"*/{rank:05d}.*"))
    config = _exact_config(_MOST_PRIORITIES - place)
    ExactDedupSignature(str(folder / "signatures"), config, EXACT_FINDERS).run(data, rank, world)
    _flush((folder / "signatures").glob(f"*/{rank:05d}.*"))


def _exact_config(priority: int) -> Any:
    from datatrove.pipeline.dedup import ExactDedupConfig  # noqa: PLC0415
    from datatrove.utils.hashing import HashConfig  # noqa: PLC0415

    return ExactDedupConfig(_text, lambda _: priority, HashConfig(hash_fc="sha1"))


def _text(document: Document) -> str:
    text: str = document.text
    return text


def find_exact(folder: Path, data: None, rank: int, world: int) -> None:
    """Pipeline step: the repeated documents whose hashes lie in range `rank` of EXACT_FINDERS."""
    from datatrove.pipeline.dedup import ExactFindDedups  # noqa: PLC0415

    _clear((folder / f"duplicates/{rank:05d}").glob("*"))
    _allow_open_files(folder / f"signatures/{rank:04d}")
    with redirect_stderr(StringIO()):  # its bar has no switch
        step = ExactFindDedups(str(folder / "signatures"), str(folder / "duplicates"), _exact_config(1))
        step.run(None, rank, EXACT_FINDERS)
    _flush((folder / f"duplicates/{rank:05d}").glob("*"))


def sign_minhash(
    folder: Path, languages: Sequence[str | None], data: Iterator[Document] | None, rank: int, world: int
) -> None:
    """Pipeline step: MinHash signatures of task `rank`, cut into words by `languages[rank]`; None takes no part."""
    from datatrove.pipeline.dedup import MinhashDedupSignature  # noqa: PLC0415

    language = languages[rank]
    if language is None:
        return
    config = _minhash_config()
    step = MinhashDedupSignature(str(folder / "signatures"), config, language)
    # The same numbers as datatrove's own two functions give, in less memory.
    step.get_shingles = lambda text: hashed_ngrams(text, language, config.n_grams).reshape(-1, 1)
    step.get_signature = partial(_min_signature, step.get_signature)
    step.run(data, rank, world)
    _flush((folder / "signatures").glob(f"*/{rank:05d}.*"))


def _minhash_config() -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig  # noqa: PLC0415
    from datatrove.utils.hashing import HashConfig  # noqa: PLC0415

    return MinhashConfig(num_buckets=MINHASH_BUCKETS, hash_config=HashConfig(hash_fc="sha1"))


def _min_signature(get_signature: Any, shingles: NDArray[np.uint64]) -> list[list[int]]:
    """A signature is the least of each hash: so it is the least of the parts' signatures."""
    parts = [get_signature(shingles[start : start + _SIGNED_GRAMS]) for start in range(0, len(shingles), _SIGNED_GRAMS)]
    least: list[list[int]] = np.array(parts, dtype=np.uint64).min(axis=0).tolist()
    return least


def find_minhash(folder: Path, data: None, rank: int, world: int) -> None:
    """Pipeline step: pairs of documents with the same signature in bucket `rank` of MINHASH_BUCKETS."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets  # noqa: PLC0415

    _allow_open_files(folder / f"signatures/bucket_{rank:03d}")
    step = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=_minhash_config())
    step.run(None, rank, MINHASH_BUCKETS)
    _flush((folder / "pairs").glob(f"{rank:05d}_*"))


def keep_first(folder: Path, data: None, rank: int, world: int) -> None:
    """Pipeline step: of every cluster of pairs, all but the first document, by task and number, are duplicates."""
    _clear((folder / "duplicates").glob("*/*"))
    later = duplicates_in_clusters(_read_pairs(path) for path in sorted((folder / "pairs").glob("*.dups")))
    tasks, starts = np.unique(later >> 32, return_index=True)
    # Without any duplicate there is no task, but split still gives one part.
    for task, numbers in zip(tasks.tolist(), np.split(later.astype("<u4"), starts[1:]), strict=False):
        with atomic_write(_duplicates(folder / "duplicates/00000", task)) as file:
            file.write(numbers.tobytes())


def _read_pairs(path: Path) -> NDArray[np.uint64]:
    """A bucket's pairs as [N, 2], each document as task * 2^32 + number."""
    fields = np.fromfile(path, dtype="<u4").reshape(-1, 4).astype(np.uint64)
    pairs: NDArray[np.uint64] = (fields[:, 0::2] << np.uint64(32)) | fields[:, 1::2]
    return pairs


def duplicates_in_clusters(parts: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Of all connected components of the pairs [N, 2], every node but the least, in rising order.

    Holds one part and a pair for each node found so far.
    """
    forest = np.empty((0, 2), dtype=np.uint64)
    for pairs in parts:
        forest = _connected_components(np.concatenate([forest, pairs]))
    later: NDArray[np.uint64] = forest[forest[:, 0] != forest[:, 1], 0]
    return later


def _connected_components(pairs: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each node in rising order, and the least node that is connected to it: [nodes, 2]."""
    nodes, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(pairs.shape)
    least = np.arange(len(nodes))
    while True:
        roots = least[ends]
        if (roots[:, 0] == roots[:, 1]).all():
            return np.stack([nodes, nodes[least]], axis=1)
        np.minimum.at(least, roots.max(axis=1), roots.min(axis=1))
        while (least[least] != least).any():
            least = least[least]


def drop_duplicates(
    folder: Path, kind: str, on_excluded: DropCallback, data: Iterator[Document], rank: int, world: int
) -> Iterator[Document]:
    """Pipeline step: the documents of task `rank`, as they were signed, without those that repeat an earlier one.

    datatrove has a filter for each kind: one shows a bar that has no switch, the other does not notice other documents.
    """
    files = sorted((folder / "duplicates").glob(_duplicates(Path("*"), rank).as_posix()))
    left = {int(number) for file in files for number in np.fromfile(file, dtype="<u4")}
    for number, document in enumerate(data):
        if number in left:
            left.remove(number)
            drop_document(document, f"duplicate ({kind})", on_excluded)
        else:
            yield document
    if left:
        raise InputError(f"{folder}: document {min(left)} of task {rank} has gone since; run prepare again")


def _duplicates(folder: Path, task: int) -> Path:
    return folder / f"{task:05d}.c4_dup"  # datatrove's name for them


def _allow_open_files(signatures: Path) -> None:
    """datatrove opens the signatures of all tasks at once; ask the system to let this process."""
    needed = len(list(signatures.glob("*"))) + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            f"{signatures}: {needed} files must be open at once, the system allows {hard}; raise its limit"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _clear(paths: Iterable[Path]) -> None:
    """datatrove writes no file where there is nothing to say: one of an earlier run would be taken for its word."""
    for path in list(paths):
        path.unlink()


def _flush(paths: Iterable[Path]) -> None:
    """Make files that datatrove wrote outlast a power cut, for the receipt that follows will."""
    files = set(paths)
    for path in files | {file.parent for file in files}:
        fsync_path(path)
