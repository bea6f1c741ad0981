"""Verification of a token store: every file exists with its recorded size and hash, and there are no other files.

The verification reads every byte and finds any flipped bit: `manifest.sha256` has the hash of the manifest, the
manifest has the hashes of the splits' manifests, and the splits' manifests have the hashes of the shards.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tinyllama.data.store import SUFFIXES
from tinyllama.errors import InputError
from tinyllama.files import read_json, sha256_of
from tinyllama.progress import BYTES, Bar

_HASH_KEYS = dict(zip(SUFFIXES, ("sha256", "documents_sha256", "rows_sha256"), strict=True))
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError)


class ExpectedFile(NamedTuple):
    """A file that a manifest lists."""

    path: Path
    sha256: str
    bytes: int | None
    """Size in bytes; None if the manifest does not record the size."""


def find_corruption(store: Path) -> list[str]:
    """Return one line for each file of a store that is changed, truncated, missing or unexpected.

    Raises InputError if `store` is not a finished store.
    """
    if not any((store / name).is_file() for name in ("manifest.json", "manifest.sha256")):
        raise InputError(f"{store}: no finished token store here; run `tinyllama prepare` with its recipe")
    manifest, problems = _read_manifest(store)
    try:
        expected, unreadable = _expected_files(store, manifest)
    except _MALFORMED:
        return [*problems, f"{store / 'manifest.json'} cannot be used: no other file was checked"]
    total = sum(file.bytes or 0 for file in expected)
    with Bar("verifying", total, BYTES, where=f"every byte of {store} is read") as bar:
        done = 0
        for file in expected:
            problems += _problems_of(file)
            done += file.bytes or 0
            bar.show(done)
    known = {file.path for file in expected} | {store / "manifest.json", store / "manifest.sha256"}
    folders = {folder for path in known for folder in path.parents}
    unexpected = (path for path in sorted(store.rglob("*")) if path not in known | folders)
    return problems + [f"{path} is unexpected" for path in unexpected if path.parent not in unreadable]


def _read_manifest(store: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the store's manifest and its problems; the manifest is empty if it is not readable."""
    path, hash_file = store / "manifest.json", store / "manifest.sha256"
    if not path.is_file():
        return {}, [f"{path} is missing"]
    problems = []
    if not hash_file.is_file():
        problems = [f"{hash_file} is missing"]
    elif hash_file.read_bytes() != f"{sha256_of(path)}  {path.name}\n".encode():
        problems = [f"{path} does not match its hash in {hash_file.name}"]
    try:
        return read_json(path), problems
    except InputError as error:
        return {}, [*problems, str(error)]


def _expected_files(store: Path, manifest: dict[str, Any]) -> tuple[list[ExpectedFile], set[Path]]:
    """Return every file that the manifests list, and the folders of splits whose manifest is not readable."""
    itemsize = int(manifest["dtype"][-1])
    expected: list[ExpectedFile] = []
    unreadable: set[Path] = set()
    for source, fields in manifest["sources"].items():
        for split, entry in fields["splits"].items():
            folder = store / source / split
            expected.append(ExpectedFile(folder / "manifest.json", entry["manifest_sha256"], None))
            try:
                own = read_json(folder / "manifest.json")
                expected.append(ExpectedFile(folder / "rejects.jsonl", own["rejects_sha256"], None))
                expected += [file for shard in own["shards"] for file in _shard_files(folder, shard, itemsize)]
            except (OSError, InputError, *_MALFORMED):
                unreadable.add(folder)
    return expected, unreadable


def _shard_files(folder: Path, shard: dict[str, Any], itemsize: int) -> Iterator[ExpectedFile]:
    sizes = {".tokens": int(shard["tokens"]) * itemsize}  # int() refuses a list, which `*` would repeat
    for suffix, key in _HASH_KEYS.items():
        path = (folder / shard["file"]).with_suffix(suffix)
        yield ExpectedFile(path, shard[key], sizes.get(suffix, int(shard["documents"]) * 8))


def _problems_of(file: ExpectedFile) -> list[str]:
    if not file.path.is_file():
        return [f"{file.path} is missing"]
    size = file.path.stat().st_size
    if file.bytes is not None and size != file.bytes:
        return [f"{file.path} has {size} bytes instead of {file.bytes}"]
    return [] if sha256_of(file.path) == file.sha256 else [f"{file.path} does not match its hash"]
