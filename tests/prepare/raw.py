"""Small raw files of each kind, and the sources that read them."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from tinyllama.prepare.readers import SourceRow, read_rows
from tinyllama.prepare.sources import list_files
from tinyllama.recipe import Source
from tinyllama.text import to_str

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
"""Function that compresses a file's content, by suffix."""
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 12345\n"
"""Content of a git-lfs pointer."""


def source(format: str, path: Path | str, **more: Any) -> Source:
    return Source.model_validate({"format": format, "path": str(path), "weight": 1.0, **more})


def lines(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def slim(text: object, subset: str = "RedPajamaC4") -> dict[str, object]:
    return {"text": text, "meta": {"redpajama_set_name": subset}}


def texts_of(chosen: Source) -> list[str]:
    """Return every usable text of a source, in the order of its files."""
    files = list_files("own", chosen)
    return [to_str(row.text) for file in files for row in read_rows(file.path, chosen) if isinstance(row, SourceRow)]
