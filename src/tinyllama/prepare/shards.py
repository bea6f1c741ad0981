"""Writes one shard of the token store: its tokens, and each document's end and row in its input file.

Files are hashed as they are written, so the manifest's hashes are of what was meant, not of what a disk gave back.
"""

import hashlib
from array import array
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from tinyllama.files import atomic_write

SUFFIXES = (".tokens", ".documents", ".rows")


class ShardWriter:
    """Writes `00000.tokens`, `.documents` and `.rows`; they get their names only when whole and not empty.

    Ends and rows (16 bytes a document) are held until the shard is closed.
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
        """Documents written so far."""
        return len(self._ends)

    def __enter__(self) -> "ShardWriter":
        self._file = self._stack.enter_context(atomic_write(self.path))
        return self

    def __exit__(self, error: type[BaseException] | None, *details: Any) -> None:
        if error is None:
            for suffix, values in ((".documents", self._ends), (".rows", self._rows)):
                self._write_numbers(self.path.with_suffix(suffix), values)
        self._stack.__exit__(error, *details)
        self.hashes[".tokens"] = self._digest.hexdigest()
        if not self.documents:
            for suffix in SUFFIXES:
                self.path.with_suffix(suffix).unlink(missing_ok=True)

    def write(self, tokens: np.ndarray[Any, Any], row: int) -> None:
        """Append one document's tokens; `row` is its place in its input file."""
        self.tokens += len(tokens)
        self._ends.append(self.tokens)
        self._rows.append(row)
        self._file.write(tokens.data)
        self._digest.update(tokens.data)

    def entry(self) -> dict[str, Any]:
        """The closed shard's entry in its split's manifest."""
        return {
            "file": self.path.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": self.hashes[".tokens"],
            "documents_sha256": self.hashes[".documents"],
            "rows_sha256": self.hashes[".rows"],
        }

    def _write_numbers(self, path: Path, values: "array[int]") -> None:
        data = np.array(values, "<u8").tobytes()
        self.hashes[path.suffix] = hashlib.sha256(data).hexdigest()
        with atomic_write(path) as file:
            file.write(data)
