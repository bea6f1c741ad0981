"""The token store: flat files of tokens, read at any place.

Reads `STORE/manifest.json` and `STORE/<source>/<split>/{manifest.json, 00000.tokens, 00000.documents}`. A split reads
as one long array whatever its shards, so a sequence may run over a shard's end and opening costs nothing a token. Reads
are pread(2) and not memory maps: as fast from a warm cache, and a file that was cut or a disk that fails is an error
with the file's name, where a map ends the process with SIGBUS.
"""

import hashlib
import os
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllama.errors import DAMAGE_ERRORS, InputError
from tinyllama.files import is_file_name, read_json, sha256_of

FORMAT_VERSION = 3
WORK_DIR = ".work"
"""Where `prepare` keeps what is under way; no source can be called so."""
CORRUPT_MESSAGE = "its documents do not end where its shard does; restore it, or delete the store and prepare it again"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of tokens beside the file of its documents' ends."""

    file: str
    """Name of the tokens file; its documents file ends in `.documents` instead."""
    tokens: int
    documents: int


Span = tuple[int, int, int]
"""A run of tokens in one shard: the shard's number, first byte, bytes."""


def _check_names(folder: Path, *names: str) -> None:
    for name in names:
        if not is_file_name(name):
            raise InputError(f"{folder}/manifest.json: names {name!r}, which is no file of the store; restore it")


class Split:
    """One split of one source, as one long array of tokens."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self.folder, self.dtype = folder, dtype
        entries = self.manifest["shards"]
        self.shards = shards = [Shard(entry["file"], entry["tokens"], entry["documents"]) for entry in entries]
        _check_names(folder, *(shard.file for shard in shards))
        for shard in shards:
            check_size(folder / shard.file, shard.tokens * dtype.itemsize)
        # Where each shard begins, and the number of all tokens; a list, which is bisected faster than an array.
        self.ends = [0, *accumulate(shard.tokens for shard in shards)]
        # A trillion tokens are 15,000 files, and a process may often have no more than 1,024 open.
        self._file = lru_cache(maxsize=128)(lambda shard: _ShardFile(folder / shards[shard].file))

    @property
    def manifest(self) -> dict[str, Any]:
        """The contents of the split's manifest.json, read anew: training has no use for its megabytes of inputs."""
        found: dict[str, Any] = read_json(self.folder / "manifest.json")
        return found

    @property
    def num_tokens(self) -> int:
        """Tokens, markers included."""
        return self.ends[-1]

    @property
    def num_documents(self) -> int:
        """Documents."""
        return sum(shard.documents for shard in self.shards)

    def num_sequences(self, length: int) -> int:
        """Sequences of `length` inputs and their targets; sequence i starts at token i x length."""
        return max(0, (self.num_tokens - 1) // length)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop) as a read-only array of the store's dtype. Raises as `pieces` and `fetch` do."""
        return np.frombuffer(b"".join(self.fetch(*piece) for piece in self.pieces(start, stop)), self.dtype)

    def pieces(self, start: int, stop: int) -> list[Span]:
        """Where tokens [start, stop) lie. Raises IndexError beyond the split."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.folder}, which has {self.num_tokens}")
        found, width, shard = [], self.dtype.itemsize, bisect_right(self.ends, start) - 1
        while start < stop:
            until = min(stop, self.ends[shard + 1])
            found.append((shard, (start - self.ends[shard]) * width, (until - start) * width))
            start, shard = until, shard + 1
        return found

    def fetch(self, shard: int, offset: int, size: int) -> bytes:
        """The bytes of a piece.

        Raises InputError with the file's name where it has been cut since it was opened, OSError with it where the disk
        fails.
        """
        return _read(self._file(shard), offset, size)

    def prefetch(self, shard: int, offset: int, size: int) -> None:
        """Have the kernel read a piece from the disk in the background."""
        os.posix_fadvise(self._file(shard).descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def documents(self) -> Iterator[NDArray[Any]]:
        """Each document's tokens, in order."""
        for shard in self.shards:
            path = self.folder / shard.file
            check_size(path.with_suffix(".documents"), shard.documents * 8)
            ends, tokens = np.fromfile(path.with_suffix(".documents"), "<u8"), np.memmap(path, self.dtype, "r")
            if (ends[1:] < ends[:-1]).any() or ends[-1] != shard.tokens:
                raise InputError(f"{path.with_suffix('.documents')}: {CORRUPT_MESSAGE}")
            yield from np.split(tokens, ends[:-1].astype(np.int64))


class TokenStore:
    """A finished token store: `store["slimpajama/train"]` is a `Split`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        beside = folder / "manifest.sha256"
        if beside.is_file():
            _check_hash(folder, "", beside.read_bytes()[:64].decode(errors="replace"))
        manifest = self.manifest
        dtype = np.dtype(manifest["dtype"])
        for source, fields in manifest["sources"].items():
            for split, entry in fields["splits"].items():
                _check_names(folder, source, split)
                _check_hash(folder, f"{source}/{split}", entry.get("manifest_sha256"))
        self.splits = {
            f"{source}/{split}": Split(folder / source / split, dtype)
            for source, fields in manifest["sources"].items()
            for split in fields["splits"]
        }

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        """Open a store. Raises InputError where there is none, only a half-written one, or one of other manifests."""
        path = Path(folder)
        if not (path / "manifest.json").is_file():
            state = "is not finished" if (path / WORK_DIR).exists() else "is not there"
            raise InputError(f"{folder}: the token store {state}; run `tinyllama prepare` with this recipe")
        try:
            return cls(path)
        except InputError:
            raise
        except DAMAGE_ERRORS:
            raise InputError(
                f"{folder}: its manifests are damaged; see `tinyllama inspect {folder} --verify`"
            ) from None

    @property
    def manifest(self) -> dict[str, Any]:
        """The contents of the store's manifest.json, read anew: training has no use for its megabytes of inputs."""
        found: dict[str, Any] = read_json(self.folder / "manifest.json")
        version = found.get("format_version") if isinstance(found, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(
                f"{self.folder}: format version {version}, this program reads {FORMAT_VERSION}; prepare it again"
            )
        return found

    def __getitem__(self, name: str) -> Split:
        if name not in self.splits:
            raise InputError(f"{self.folder}: no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    def __contains__(self, name: str) -> bool:
        return name in self.splits

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds the hashes of the splits' manifests, which hold those of the shards."""
        return hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()


class _ShardFile:
    """A file that stays open as long as anyone holds this."""

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


def _read(file: _ShardFile, offset: int, size: int) -> bytes:
    try:
        data = os.pread(file.descriptor, size, offset)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.path)) from None
    if len(data) == size:
        return data
    if not data:
        raise InputError(f"{file.path}: ends at byte {offset}, and was longer when opened; restore it and go on")
    return data + _read(file, offset + len(data), size - len(data))


def _check_hash(store: Path, split: str, promised: str | None) -> None:
    """A number changed in a manifest would be another order of the data; the shards' bytes are `verification`'s."""
    manifest = store / split / "manifest.json"
    if promised is not None and sha256_of(manifest) != promised:
        raise InputError(f"{manifest}: does not match its hash; see `tinyllama inspect {store} --verify`")


def check_size(path: Path, expected_bytes: int) -> None:
    """Raise InputError where a file is missing or has another size."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        found = None
    if found != expected_bytes:
        state = "is missing" if found is None else f"has {found} bytes instead of {expected_bytes}"
        raise InputError(f"{path}: {state}; restore it, or delete the store and prepare it again")
