"""Raw files to documents: SlimPajama, Starcoderdata, and plain jsonl, parquet, text and csv.

Reads files in sorted order, so no listing order matters. A row that cannot be used becomes a `Reject` with its reason;
a file that cannot be read to its end raises, naming the file: nothing is skipped silently.
"""

import csv
import glob
import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import zstandard

from tinyllama.errors import InputError
from tinyllama.recipe_data import Source

_SUFFIXES = {
    "slimpajama": (".jsonl.zst", ".jsonl.gz", ".jsonl"),
    "starcoderdata": (".parquet",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
    "text": (".txt",),
    "csv": (".csv",),
    "huggingface": (".parquet",),
}
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """A raw file and the split that its folder puts it in."""

    path: Path
    split: str
    """`train` or `validation`."""


@dataclass(frozen=True)
class Reject:
    """A row that is not used."""

    row: int
    """Place in the file, counted from 0."""
    reason: str
    counted_only: bool = False
    """Left out by the recipe rather than by a fault: counted, not listed."""


@dataclass(frozen=True)
class Row:
    """A row that is used."""

    row: int
    """Place in the file, counted from 0."""
    text: str


def list_files(name: str, source: Source) -> list[InputFile]:
    """Every file of a source, sorted by path. Raises InputError where there is none."""
    root = Path(source.path)
    suffixes = _SUFFIXES[source.format]
    if root.is_file():
        paths = [root]
    else:
        found = root.rglob("*") if root.is_dir() else map(Path, glob.glob(source.path, recursive=True))  # noqa: PTH207 - Path has no absolute globs
        paths = sorted(path for path in found if path.name.endswith(suffixes) and path.is_file())
    files = [file for path in paths if (file := _placed(path, root, source)) is not None]
    if not files:
        wanted = " or ".join(suffixes)
        raise InputError(
            f"data.sources.{name}: no {wanted} file under {source.path}; correct path, or put the data there"
        )
    return files


def _placed(path: Path, root: Path, source: Source) -> InputFile | None:
    parts = path.relative_to(root).parts if root.is_dir() else ()
    if source.format == "slimpajama" and len(parts) > 1 and parts[0] in ("train", "validation", "test"):
        return None if parts[0] == "test" else InputFile(path, parts[0])
    if source.format == "starcoderdata":
        language = path.parent.name
        if language in source.exclude or (source.include and language not in source.include):
            return None
    return InputFile(path, "train")


def read_rows(path: Path, source: Source) -> Iterator[Row | Reject]:
    """Every row of a file, used or not. Raises InputError where the file cannot be read to its end."""
    readers: dict[str, Callable[[Path, Source], Iterator[Row | Reject]]] = {
        "slimpajama": _slimpajama,
        "starcoderdata": lambda path, source: _parquet(path, "content"),
        "jsonl": lambda path, source: _jsonl(path, source.text or "text"),
        "parquet": lambda path, source: _parquet(path, source.text or "text"),
        "text": lambda path, source: _text(path),
        "csv": lambda path, source: _csv(path, source.text or "text"),
    }
    try:
        yield from readers[source.format](path, source)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException, csv.Error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read to its end ({reason}); fetch it again or take it out") from None


def _slimpajama(path: Path, source: Source) -> Iterator[Row | Reject]:
    for number, fields in _json_objects(path):
        if isinstance(fields, Reject):
            yield fields
            continue
        meta = fields.get("meta")
        subset = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
        if not isinstance(subset, str):
            yield Reject(number, "no meta.redpajama_set_name")
        elif subset in source.exclude:
            yield Reject(number, f"excluded: {subset}", counted_only=True)
        else:
            yield _usable(number, fields, "text")


def _jsonl(path: Path, field: str) -> Iterator[Row | Reject]:
    for number, fields in _json_objects(path):
        yield fields if isinstance(fields, Reject) else _usable(number, fields, field)


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    for number, line in enumerate(_lines(path)):
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError:
            yield number, Reject(number, "invalid JSON")
            continue
        yield number, fields if isinstance(fields, dict) else Reject(number, "not a JSON object")


def _usable(number: int, fields: dict[str, Any], field: str) -> Row | Reject:
    text = fields.get(field)
    if not isinstance(text, str):
        return Reject(number, f"no {field}" if text is None else f"{field} is not text")
    return Row(number, text) if text else Reject(number, f"empty {field}")


def _parquet(path: Path, column: str) -> Iterator[Row | Reject]:
    with pyarrow.parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            have = ", ".join(file.schema_arrow.names)
            raise InputError(f"{path}: no column {column!r} (it has {have}); name the right one or exclude the folder")
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for text in batch.column(0).to_pylist():
                yield _usable(number, {column: text}, column)
                number += 1


def _text(path: Path) -> Iterator[Row | Reject]:
    try:
        yield _usable(0, {"text": path.read_bytes().decode()}, "text")
    except UnicodeDecodeError:
        yield Reject(0, "not UTF-8 text")


def _csv(path: Path, column: str) -> Iterator[Row | Reject]:
    csv.field_size_limit(1 << 31)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, strict=True)  # a file cut inside quotes is an error
            if column not in (rows.fieldnames or ()):
                raise InputError(f"{path}: no column {column!r} (it has {', '.join(rows.fieldnames or ())})")
            for number, fields in enumerate(rows):
                yield _usable(number, fields, column)
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; convert it, or take it out") from None


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain, gzip or zstd file, blank ones left out; a line may be of any length."""
    pieces: list[bytes] = []
    for chunk in _chunks(path):
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        if rest:
            yield from filter(bytes.strip, (b"".join(pieces), *rest[:-1]))
            pieces = [rest[-1]]
    yield from filter(bytes.strip, (b"".join(pieces),))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        if path.suffix == ".zst":
            yield from _zstd_chunks(raw)
        else:
            file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


def _zstd_chunks(raw: Any) -> Iterator[bytes]:
    # zstandard's own stream reader ends without a word where a frame is cut off, so the frames' ends are watched here.
    frame = None
    while chunk := raw.read(_CHUNK_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the zstd stream is cut off")
