"""Readers of files with one JSON object per line, to which a process may be appending. Imports no torch."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from tinyllama.errors import InputError

Row = dict[str, Any]

_CHUNK_BYTES = 1 << 22
"""Number of bytes that `rows_since` reads per call: about 20,000 rows of metrics."""


def numbered_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each complete line of a JSONL file; a line that is not JSON has the value None."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield number, _parse(line)


def _parse(line: bytes) -> Any:
    for loads in (orjson.loads, json.loads):  # json also reads NaN
        try:
            return loads(line)
        except (ValueError, RecursionError):
            continue
    return None


def rows_since(path: Path, offset: int) -> tuple[list[Row], int]:
    """Return the next rows after byte `offset`, and the offset of the byte after these rows.

    Each call reads at most `_CHUNK_BYTES` bytes, and returns no rows at the end of the file. If the file has become
    shorter than `offset`, reading starts from the beginning. Raises InputError, with the line number, if a line is not
    a row with a step.
    """
    if not path.is_file():
        return [], offset
    with path.open("rb") as file:
        if offset > os.fstat(file.fileno()).st_size:
            offset = 0
        file.seek(offset)
        data = file.read(_CHUNK_BYTES)
    data = data[: data.rfind(b"\n") + 1]
    rows = [_parse(line) for line in data.splitlines()]
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and "step" in row):
            before = path.read_bytes()[:offset].count(b"\n")
            raise InputError(f"{path}:{before + number}: not a row of JSON with a step; correct or delete the line")
    return rows, offset + len(data)


def last_rows(path: Path, num_bytes: int) -> list[Row]:
    """Return the rows in the last `num_bytes` of a file; skip lines that are not rows."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - num_bytes)
        file.seek(start)
        data = file.read(num_bytes)
    lines = data[: data.rfind(b"\n") + 1].splitlines()[1 if start else 0 :]
    return [row for row in map(_parse, lines) if isinstance(row, dict)]
