"""Writes one shard of the token store: a file of tokens beside the file of its documents' ends.

Both are hashed as they are written, so the manifest's hashes are of what was meant, not of what a disk gave back.
"""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from tinyllama.files import write_atomically


class ShardWriter:
    """Writes `00000.tokens` and `00000.documents`, which get their names only when both are whole and not empty."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"{number:05d}.tokens"
        self.tokens = self.documents = 0
        self._hashes = hashlib.sha256(), hashlib.sha256()
        self._stack = ExitStack()
        self._files: tuple[IO[bytes], IO[bytes]]

    def __enter__(self) -> "ShardWriter":
        paths = (self.path, self.path.with_suffix(".documents"))
        first, second = (self._stack.enter_context(write_atomically(path)) for path in paths)
        self._files = first, second
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if not self.documents:
            for path in (self.path, self.path.with_suffix(".documents")):
                path.unlink(missing_ok=True)

    def write(self, tokens: Any) -> None:
        """Append one document's tokens."""
        self.tokens += len(tokens)
        self.documents += 1
        ends = self.tokens.to_bytes(8, "little")
        for file, digest, data in zip(self._files, self._hashes, (tokens.data, ends), strict=True):
            file.write(data)
            digest.update(data)

    def entry(self) -> dict[str, Any]:
        """The shard's entry in its split's manifest."""
        tokens, documents = (digest.hexdigest() for digest in self._hashes)
        return {
            "file": self.path.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": tokens,
            "documents_sha256": documents,
        }
