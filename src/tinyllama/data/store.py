"""Token store: flat files of tokens, read at random positions, with the provenance of every document.

A store consists of `STORE/manifest.json` and `STORE/<source>/<split>/{manifest.json, 00000.{tokens,documents,rows}}`. A
split is one long array across its shards. The time to open a split does not depend on its number of tokens. Tokens are
read with pread(2), which is as fast as a memory map if the file is in the page cache. If a file was truncated or the
disk fails, the error names the file, whereas a memory map would end the process with SIGBUS.
"""

import os
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllama.errors import DAMAGE_ERRORS, InputError
from tinyllama.files import is_file_name, read_json, read_regular_file, sha256_of

FORMAT_VERSION = 3
WORK_DIR = ".work"
"""Folder in which `prepare` keeps unfinished work; no source can have this name."""
HASH_KEYS = {".tokens": "sha256", ".documents": "documents_sha256", ".rows": "rows_sha256"}
"""Suffixes of a shard's files: token ids, end of each document, and row of each document in its input file. The value
is the key of the file's SHA-256 in the shard's manifest entry."""
_CORRUPT = "the ends of the documents do not match the shard; restore it, or delete the store and prepare it again"


@dataclass(frozen=True, slots=True)
class Shard:
    """Name of a shard's file, and the shard's numbers of tokens and documents."""

    file: str
    """Name of the file of tokens; the shard's other files have other suffixes."""
    tokens: int
    documents: int


def num_sequences(num_tokens: int, length: int) -> int:
    """Return the number of sequences of `length` inputs and targets in a split of so many tokens."""
    return max(0, (num_tokens - 1) // length)


Span = tuple[int, int, int]
"""Consecutive tokens of one shard: number of the shard, offset in bytes, size in bytes."""


@dataclass(frozen=True)
class StoredDocument:
    """A document of a split and its provenance."""

    number: int
    """Index of the document in the split."""
    start: int
    """Index of the document's first token in the split."""
    tokens: int
    """Length in tokens, BOS and EOS included."""
    file: str
    """Input file."""
    sha256: str
    """SHA-256 of the input file."""
    row: int
    """Index of the document's row in the input file."""


class Split:
    """One split of one source, as one long array of tokens.

    `split[i]` has the token ids of document i. `len(split)` is the number of documents, and iteration yields them in
    order.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self.folder, self.dtype = folder, dtype
        entries = self.manifest["shards"]
        self.shards = shards = [Shard(entry["file"], entry["tokens"], entry["documents"]) for entry in entries]
        _check_names(folder, *(shard.file for shard in shards))
        for shard in shards:
            _check_size(folder / shard.file, shard.tokens * dtype.itemsize)
        # Index of each shard's first token, then the number of all tokens; a list, since bisect is slower on an array.
        self.ends = [0, *accumulate(shard.tokens for shard in shards)]
        # Index of each shard's first document, then the number of all documents.
        self._first_documents = [0, *accumulate(shard.documents for shard in shards)]
        # At most 128 files are open: a trillion tokens take 15,000 files, but a process may usually open only 1,024.
        self._file = lru_cache(maxsize=128)(
            lambda shard, suffix: _ShardFile((folder / shards[shard].file).with_suffix(suffix))
        )

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, number: int) -> NDArray[Any]:
        """Return the token ids of a document, BOS and EOS included. Raises IndexError if there is no such document."""
        shard, _, start, end = self._locate(number + len(self) if number < 0 else number)
        return self.read(self.ends[shard] + start, self.ends[shard] + end)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return map(self.__getitem__, range(len(self)))

    def __repr__(self) -> str:
        return f"Split({self.folder}: {self.num_documents:,} documents, {self.num_tokens:,} tokens)"

    @property
    def manifest(self) -> dict[str, Any]:
        """The split's manifest.json, read at each access, since its list of inputs would occupy megabytes of memory."""
        found: dict[str, Any] = read_json(self.folder / "manifest.json")
        return found

    @property
    def num_tokens(self) -> int:
        """Number of tokens, BOS and EOS included."""
        return self.ends[-1]

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self._first_documents[-1]

    def num_sequences(self, length: int) -> int:
        """Return the number of sequences of `length` inputs and targets; sequence i starts at token i x length."""
        return num_sequences(self.num_tokens, length)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return tokens [start, stop) as a read-only array of the store's dtype.

        Raises the same errors as `spans` and `read_span`.
        """
        return np.frombuffer(b"".join(self.read_span(*span) for span in self.spans(start, stop)), self.dtype)

    def spans(self, start: int, stop: int) -> list[Span]:
        """Return the spans that contain tokens [start, stop). Raises IndexError if a token is not in the split."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.folder}: out of range; it has {self.num_tokens} tokens")
        found, width, shard = [], self.dtype.itemsize, bisect_right(self.ends, start) - 1
        while start < stop:
            end = min(stop, self.ends[shard + 1])
            found.append((shard, (start - self.ends[shard]) * width, (end - start) * width))
            start, shard = end, shard + 1
        return found

    def document_starts(self, start: int, stop: int) -> NDArray[np.int32]:
        """Return, for each of the tokens [start, stop), the index of the first token of its document.

        Indices are counted from `start`. The index is 0 if the document began before `start`. Raises the same errors as
        `spans` and `read_span`, and InputError if a file is damaged.
        """
        indices, width = np.zeros(stop - start, np.int32), self.dtype.itemsize
        for shard, offset, size in self.spans(start, stop):
            beginnings = self._beginnings(shard, offset // width, (offset + size) // width)
            places = beginnings + (self.ends[shard] - start)
            indices[places] = places
        return np.maximum.accumulate(indices)

    def _beginnings(self, shard: int, first: int, stop: int) -> NDArray[np.int64]:
        """Return `first`, and the tokens between `first` and `stop` of a shard at which a document begins."""

        def end(number: int) -> int:
            return int.from_bytes(self.read_span(shard, 8 * number, 8, ".documents"), "little")

        file = self._file(shard, ".documents")
        count = os.fstat(file.descriptor).st_size // 8
        place = bisect_right(range(count), first, key=end)
        data = self.read_span(shard, 8 * place, 8 * min(stop - first, count - place), ".documents")
        ends = np.frombuffer(first.to_bytes(8, "little") + data, "<i8")
        if ends[-1] < stop or (ends[1:] < ends[:-1]).any():
            raise InputError(f"{file.path}: {_CORRUPT}")
        return ends[ends < stop]

    def read_span(self, shard: int, offset: int, size: int, suffix: str = ".tokens") -> bytes:
        """Return the bytes of a span of the shard's file with this suffix.

        Raises InputError if the file is shorter, and OSError if the disk fails. Both errors name the file.
        """
        file, data = self._file(shard, suffix), b""
        while len(data) < size:
            try:
                part = os.pread(file.descriptor, size - len(data), offset + len(data))
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(file.path)) from None
            if not part:
                end = os.fstat(file.descriptor).st_size
                raise InputError(f"{file.path}: ends at byte {end}, before the end of its shard; restore it and resume")
            data += part
        return data

    def prefetch(self, shard: int, offset: int, size: int) -> None:
        """Ask the operating system to read a span from the disk in the background."""
        os.posix_fadvise(self._file(shard, ".tokens").descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def prefetch_documents(self, shard: int) -> None:
        """Ask the operating system to read the ends of a shard's documents, 8 bytes each, in the background."""
        os.posix_fadvise(self._file(shard, ".documents").descriptor, 0, 0, os.POSIX_FADV_WILLNEED)  # the complete file

    def find_documents(self, numbers: Iterable[int]) -> Iterator[StoredDocument]:
        """Yield the documents with the given numbers.

        Raises IndexError if a number is not in the split, and InputError if a file is damaged.
        """
        inputs = [shard["inputs"] for shard in self.manifest["shards"]]
        for number in numbers:
            shard, place, start, end = self._locate(number)
            # The documents of a shard have the same order as its input files.
            last = accumulate(entry["documents"] for entry in inputs[shard])
            source = next(entry for entry, stop in zip(inputs[shard], last, strict=True) if place < stop)
            row = int(self._numbers(shard, ".rows")[place])
            yield StoredDocument(number, self.ends[shard] + start, end - start, source["path"], source["sha256"], row)

    def documents_between(self, start: int, stop: int) -> Iterator[StoredDocument]:
        """Yield the documents that have a token in [start, stop), in order.

        Raises the same errors as `find_documents`.
        """
        shard = bisect_right(self.ends, start) - 1
        place = int(np.searchsorted(self._numbers(shard, ".documents"), start - self.ends[shard], "right"))
        numbers = range(self._first_documents[shard] + place, self.num_documents)
        return takewhile(lambda document: document.start < stop, self.find_documents(numbers))

    def _locate(self, number: int) -> tuple[int, int, int, int]:
        """Return a document's shard, its index in the shard, and its first token and its end in the shard."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.folder}: out of range; it has {self.num_documents} documents")
        shard = bisect_right(self._first_documents, number) - 1
        place, ends = number - self._first_documents[shard], self._numbers(shard, ".documents")
        start, end = int(ends[place - 1]) if place else 0, int(ends[place])
        if not start <= end <= self.shards[shard].tokens:
            raise InputError(f"{(self.folder / self.shards[shard].file).with_suffix('.documents')}: {_CORRUPT}")
        return shard, place, start, end

    def _numbers(self, shard: int, suffix: str) -> NDArray[np.uint64]:
        path = (self.folder / self.shards[shard].file).with_suffix(suffix)
        _check_size(path, self.shards[shard].documents * 8)
        return np.memmap(path, "<u8", "r")


class TokenStore:
    """A finished token store; `store["slimpajama/train"]` returns a `Split`. Iteration yields the splits' names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        hash_file = folder / "manifest.sha256"
        if hash_file.is_file():
            self._check_manifest("", read_regular_file(hash_file)[:64].decode(errors="replace"))
        manifest = self.manifest
        dtype = np.dtype(manifest["dtype"])
        self.splits: dict[str, Split] = {}
        for source, fields in manifest["sources"].items():
            for split, entry in fields["splits"].items():
                _check_names(folder, source, split)
                self._check_manifest(f"{source}/{split}", entry.get("manifest_sha256"))
                self.splits[f"{source}/{split}"] = Split(folder / source / split, dtype)

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Return whether the folder has a manifest, which is written last and thus marks a complete store."""
        return (Path(folder) / "manifest.json").is_file()

    @classmethod
    def problem(cls, folder: str | Path) -> str:
        """Return the state of a store that is not complete, such as `does not exist`, or an empty string."""
        if cls.exists(folder):
            return ""
        return "is not finished" if Path(folder, WORK_DIR).exists() else "does not exist"

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        """Open a store. Raises InputError if the store is missing, unfinished, damaged or of another format version."""
        if problem := cls.problem(folder):
            raise InputError(f"{folder}: the token store {problem}; run `tinyllama prepare` with its recipe")
        try:
            return cls(Path(folder))
        except InputError:
            raise
        except DAMAGE_ERRORS:
            raise InputError(
                f"{folder}: its manifests are damaged; run `tinyllama inspect {folder} --verify`"
            ) from None

    @property
    def manifest(self) -> dict[str, Any]:
        """The store's manifest.json, read at each access, since its list of inputs would occupy megabytes of memory."""
        found: dict[str, Any] = read_json(self.folder / "manifest.json")
        version = found.get("format_version") if isinstance(found, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(
                f"{self.folder}: format version {version}, but this program reads {FORMAT_VERSION}; prepare it again"
            )
        return found

    def __getitem__(self, name: str) -> Split:
        if name not in self.splits:
            raise InputError(f"{self.folder}: no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    def num_validation_sequences(self, source: str, length: int) -> int:
        """Return the number of sequences of `length` inputs in a source's validation split; 0 without such a split."""
        name = f"{source}/validation"
        return self.splits[name].num_sequences(length) if name in self.splits else 0

    def __contains__(self, name: str) -> bool:
        return name in self.splits

    def __iter__(self) -> Iterator[str]:
        return iter(self.splits)

    def __len__(self) -> int:
        return len(self.splits)

    def __repr__(self) -> str:
        tokens = sum(split.num_tokens for split in self.splits.values())
        return f"TokenStore({self.folder}: {len(self)} splits, {tokens:,} tokens)"

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which contains the hashes of the splits' manifests and thus covers all shards."""
        return sha256_of(self.folder / "manifest.json")

    def _check_manifest(self, split: str, expected: str | None) -> None:
        """Raise InputError if a manifest was changed, since a changed manifest could change the data order.

        Only `find_corruption` checks the hashes of the shards.
        """
        manifest = self.folder / split / "manifest.json"
        if expected is not None and sha256_of(manifest) != expected:
            raise InputError(f"{manifest}: does not match its hash; see `tinyllama inspect {self.folder} --verify`")


class _ShardFile:
    """Open file of a shard, which is closed when this object is garbage-collected."""

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


def _check_names(folder: Path, *names: str) -> None:
    for name in names:
        if not is_file_name(name):
            raise InputError(
                f"{folder}/manifest.json: names {name!r}, which is not a file of the store; restore the file"
            )


def _check_size(path: Path, expected_bytes: int) -> None:
    """Raise InputError if a file is missing or does not have the expected size."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        found = None
    if found != expected_bytes:
        state = "is missing" if found is None else f"has {found} bytes instead of {expected_bytes}"
        raise InputError(f"{path}: {state}; restore it, or delete the store and prepare it again")
