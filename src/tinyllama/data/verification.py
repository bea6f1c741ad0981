"""Whether a token store is whole: every file there, of its size, with its hash, and no other.

Reads every byte. The manifest's own hash stands beside it; it holds the splits' manifests' hashes, which hold those of
the shards, so no bit can flip unseen.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tinyllama.errors import InputError
from tinyllama.files import read_json, sha256_of
from tinyllama.prepare.shards import SUFFIXES
from tinyllama.progress import BYTES, Bar

_HASHES = dict(zip(SUFFIXES, ("sha256", "documents_sha256", "rows_sha256"), strict=True))


class ExpectedFile(NamedTuple):
    """A file that a manifest promises."""

    path: Path
    sha256: str
    bytes: int | None
    """None where the manifest does not say."""


def find_corruption(store: Path) -> list[str]:
    """Each file of a store that does not match its hash, is cut, missing, or foreign: one line each.

    Raises InputError where there is no finished store.
    """
    if not any((store / name).is_file() for name in ("manifest.json", "manifest.sha256")):
        raise InputError(f"{store}: no finished token store here; run `tinyllama prepare` with its recipe")
    manifest, found = _manifest(store)
    try:
        expected, unread = _expected(store, manifest)
    except (LookupError, TypeError, ValueError, AttributeError):
        return [*found, f"{store / 'manifest.json'} cannot be used: no other file was looked at"]
    total = sum(one.bytes or 0 for one in expected)
    with Bar("verifying", total, BYTES, where=f"every byte of {store} is read") as bar:
        done = 0
        for one in expected:
            found += _file_problems(one)
            done += one.bytes or 0
            bar.show(done)
    return found + list(_unexpected_files(store, expected, unread))


def _manifest(store: Path) -> tuple[dict[str, Any], list[str]]:
    """The store's manifest, empty where it cannot be read, and what is wrong with it."""
    path, beside = store / "manifest.json", store / "manifest.sha256"
    if not path.is_file():
        return {}, [f"{path} is missing"]
    if not beside.is_file():
        found = [f"{beside} is missing"]
    else:
        is_same = beside.read_bytes() == f"{sha256_of(path)}  {path.name}\n".encode()
        found = [] if is_same else [f"{path} does not match its hash in {beside.name}"]
    try:
        return read_json(path), found
    except InputError as error:
        return {}, [*found, str(error)]


def _expected(store: Path, manifest: dict[str, Any]) -> tuple[list[ExpectedFile], set[Path]]:
    """Every file that the manifests promise, and the folders of splits whose manifest cannot be read."""
    itemsize = int(manifest["dtype"][-1])
    expected: list[ExpectedFile] = []
    unread: set[Path] = set()
    for source, fields in manifest["sources"].items():
        for split, entry in fields["splits"].items():
            folder = store / source / split
            expected.append(ExpectedFile(folder / "manifest.json", entry["manifest_sha256"], None))
            try:
                own = read_json(folder / "manifest.json")
                expected.append(ExpectedFile(folder / "rejects.jsonl", own["rejects_sha256"], None))
                expected += [file for shard in own["shards"] for file in _shard_files(folder, shard, itemsize)]
            except (OSError, InputError, LookupError, TypeError, ValueError, AttributeError):
                unread.add(folder)
    return expected, unread


def _shard_files(folder: Path, shard: dict[str, Any], itemsize: int) -> Iterator[ExpectedFile]:
    sizes = {".tokens": int(shard["tokens"]) * itemsize}  # a list would be repeated
    for suffix, key in _HASHES.items():
        path = (folder / shard["file"]).with_suffix(suffix)
        yield ExpectedFile(path, shard[key], sizes.get(suffix, int(shard["documents"]) * 8))


def _file_problems(one: ExpectedFile) -> list[str]:
    if not one.path.is_file():
        return [f"{one.path} is missing"]
    size = one.path.stat().st_size
    if one.bytes is not None and size != one.bytes:
        return [f"{one.path} has {size} bytes instead of {one.bytes}"]
    return [] if sha256_of(one.path) == one.sha256 else [f"{one.path} does not match its hash"]


def _unexpected_files(store: Path, expected: list[ExpectedFile], unread: set[Path]) -> Iterator[str]:
    known = {one.path for one in expected} | {store / "manifest.json", store / "manifest.sha256"}
    folders = {folder for path in known for folder in path.parents}
    for path in sorted(store.rglob("*")):
        if path not in known | folders and path.parent not in unread:
            yield f"{path} is foreign"
