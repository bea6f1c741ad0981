"""Writer of a shard of the token store, which `prepare` fills document by document."""

import hashlib
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from tinyllama.data.store import HASH_KEYS
from tinyllama.files import atomic_write


class ShardWriter:
    """Writer of a shard's files (`00000.tokens`, `.documents` and `.rows`), which appear when the `with` block ends.

    A shard without documents has no files. The hashes are computed from the bytes in memory, so a later check detects
    bytes that the disk corrupted. The end and the row of each document are kept in memory until the block ends, in 16
    bytes per document.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"{number:05d}.tokens"
        self.tokens = 0
        self.hashes: dict[str, str] = {}
        self._ends, self._rows = array("Q"), array("Q")
        self._digest = hashlib.sha256()
        self._stack = ExitStack()
        self._file: IO[bytes]

    @property
    def documents(self) -> int:
        """Number of documents written so far."""
        return len(self._ends)

    def __enter__(self) -> "ShardWriter":
        self._file = self._stack.enter_context(atomic_write(self.path))
        return self

    def __exit__(self, error: type[BaseException] | None, *details: Any) -> None:
        if error is None:
            for suffix, values in ((".documents", self._ends), (".rows", self._rows)):
                data = np.array(values, "<u8").tobytes()
                self.hashes[suffix] = hashlib.sha256(data).hexdigest()
                with atomic_write(self.path.with_suffix(suffix)) as file:
                    file.write(data)
        self._stack.__exit__(error, *details)
        self.hashes[".tokens"] = self._digest.hexdigest()
        if not self.documents:
            for suffix in HASH_KEYS:
                self.path.with_suffix(suffix).unlink(missing_ok=True)

    def write(self, parts: Iterable[np.ndarray[Any, Any]], row: int) -> int:
        """Append one document's tokens, which are given in parts; return their number.

        `row` is the index of the document's row in the input file.
        """
        before = self.tokens
        for tokens in parts:
            self.tokens += len(tokens)
            self._file.write(tokens.data)
            self._digest.update(tokens.data)
        self._ends.append(self.tokens)
        self._rows.append(row)
        return self.tokens - before

    def entry(self) -> dict[str, Any]:
        """Return the finished shard's entry for the manifest of its split."""
        counts = {"file": self.path.name, "tokens": self.tokens, "documents": self.documents}
        return counts | {key: self.hashes[suffix] for suffix, key in HASH_KEYS.items()}
