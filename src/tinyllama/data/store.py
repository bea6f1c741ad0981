"""The token store: flat files of tokens that are opened as memory maps.

Reads `STORE/manifest.json` and `STORE/<source>/<split>/{manifest.json, 00000.tokens, 00000.documents}`. A split reads
as one long array whatever its shards, so a sequence may run over a shard's end and opening costs nothing a token.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllama.errors import InputError
from tinyllama.files import read_json, sha256_of

FORMAT_VERSION = 1
WORK = ".work"
"""Where `prepare` keeps what is under way; no source can be called so."""


@dataclass(frozen=True)
class Shard:
    """One file of tokens beside the file of its documents' ends."""

    file: str
    """Name of the tokens file; its documents file ends in `.documents` instead."""
    tokens: int
    documents: int
    sha256: str
    documents_sha256: str


class Split:
    """One split of one source, as one long array of tokens."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self.folder, self.dtype = folder, dtype
        manifest = read_json(folder / "manifest.json")
        fields = Shard.__dataclass_fields__
        self.shards = [Shard(**{key: shard[key] for key in fields}) for shard in manifest["shards"]]
        self.manifest = manifest
        for shard in self.shards:
            _check_size(folder / shard.file, shard.tokens * dtype.itemsize)
        self.ends = np.cumsum([0] + [shard.tokens for shard in self.shards])

    @property
    def num_tokens(self) -> int:
        """Tokens, markers included."""
        return int(self.ends[-1])

    @property
    def num_documents(self) -> int:
        """Documents."""
        return sum(shard.documents for shard in self.shards)

    def num_sequences(self, length: int) -> int:
        """Sequences of `length` inputs and their targets; sequence i starts at token i x length."""
        return max(0, (self.num_tokens - 1) // length)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop) as an array of the store's dtype; a view where they lie in one shard."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.folder}, which has {self.num_tokens}")
        first = int(np.searchsorted(self.ends, start, "right")) - 1
        pieces: list[NDArray[Any]] = []
        while start < stop:
            offset, end = int(self.ends[first]), int(self.ends[first + 1])
            pieces.append(self._tokens(first)[start - offset : min(stop, end) - offset])
            start, first = min(stop, end), first + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def documents(self) -> Iterator[NDArray[Any]]:
        """Each document's tokens, in order."""
        for number, shard in enumerate(self.shards):
            ends = np.fromfile(self.folder / _documents(shard.file), "<u8")
            yield from np.split(self._tokens(number), ends[:-1].astype(np.int64))

    @cached_property
    def _tokens(self) -> Any:
        # A map for each of a trillion tokens' 14,000 shards would use up the process's maps; the last ones used stay.
        @lru_cache(maxsize=1024)
        def open_shard(number: int) -> NDArray[Any]:
            return np.memmap(self.folder / self.shards[number].file, self.dtype, "r")

        return open_shard


class TokenStore:
    """A finished token store: `store["slimpajama/train"]` is a `Split`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        dtype = np.dtype(manifest["dtype"])
        self.splits = {
            f"{source}/{split}": Split(folder / source / split, dtype)
            for source, fields in manifest["sources"].items()
            for split in fields["splits"]
        }

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        """Open a store. Raises InputError where there is none, or only a half-written one."""
        path = Path(folder)
        if not (path / "manifest.json").is_file():
            state = "is not finished" if (path / WORK).exists() else "is not there"
            raise InputError(f"{folder}: the token store {state}; run `tinyllama prepare` with this recipe")
        manifest = read_json(path / "manifest.json")
        if manifest.get("format_version") != FORMAT_VERSION:
            found = manifest.get("format_version")
            raise InputError(f"{folder}: format version {found}, this program reads {FORMAT_VERSION}; prepare it again")
        return cls(path, manifest)

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

    def problems(self) -> Iterator[str]:
        """Each file that does not match its hash, is missing, or is foreign: a line each. Reads every byte."""
        expected = {"manifest.json"}
        for name, split in self.splits.items():
            source, part = name.split("/")
            promised = self.manifest["sources"][source]["splits"][part]["manifest_sha256"]
            files = {"manifest.json": promised, "rejects.jsonl": split.manifest["rejects_sha256"]}
            for shard in split.shards:
                files |= {shard.file: shard.sha256, _documents(shard.file): shard.documents_sha256}
            expected |= {f"{name}/{file}" for file in files}
            for file, sha256 in files.items():
                yield from _file_problems(split.folder / file, sha256)
        present = (path for path in self.folder.rglob("*") if path.is_file())
        yield from (
            f"{path} is foreign" for path in sorted(present) if str(path.relative_to(self.folder)) not in expected
        )


def _documents(tokens_file: str) -> str:
    return tokens_file.removesuffix(".tokens") + ".documents"


def _check_size(path: Path, expected_bytes: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != expected_bytes:
        state = "is missing" if found is None else f"has {found} bytes instead of {expected_bytes}"
        raise InputError(f"{path}: {state}; restore it, or delete the store and prepare it again")


def _file_problems(path: Path, sha256: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{path} is missing"
    elif sha256_of(path) != sha256:
        yield f"{path} does not match its hash"
