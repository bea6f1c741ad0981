"""A mutated gzip or zstd file is read or refused by name; with a checksum it never gives another text.

gzip always has a checksum; a zstd frame has one if the `zstd` command wrote it, but not from `zstandard.compress`.
"""

import gzip
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.strategies import fixed_examples, mutate, mutations
from tests.fuzz.test_readers import read, valid_file

CHECKED = {
    "gzip": (".jsonl.gz", lambda lines: gzip.compress(lines, mtime=0)),
    "zstd with checksum": (".jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress),
}
COMPRESSIONS: dict[str, tuple[str, Any]] = {**CHECKED, "zstd without checksum": (".jsonl.zst", zstandard.compress)}


def compressed_file(kind: str) -> tuple[str, bytes]:
    """Return the suffix and the bytes of a file with a few lines."""
    suffix, compress = COMPRESSIONS[kind]
    return suffix, compress(valid_file("jsonl", ".jsonl"))


def has_checksum(data: bytes, suffix: str) -> bool:
    """Return whether a file that was read completely still has a checksum: a mutation can remove the flag."""
    return suffix == ".jsonl.gz" or zstandard.get_frame_parameters(data).has_checksum


@fixed_examples(100)
@given(kind=st.sampled_from(list(COMPRESSIONS)), edits=mutations)
def test_mutated_compressed_file_never_gives_other_text_with_checksum(kind: str, edits: Any) -> None:
    suffix, data = compressed_file(kind)
    rows = read("jsonl", suffix, mutate(data, edits))
    if rows is not None and has_checksum(mutate(data, edits), suffix):
        assert rows == read("jsonl", ".jsonl", valid_file("jsonl", ".jsonl"))


def with_one_bit_flipped(kind: str) -> list[Any]:
    """Return what is read after one bit of each byte in turn is flipped."""
    suffix, data = compressed_file(kind)
    return [read("jsonl", suffix, mutate(data, [("flip", n, bytes([1 << n % 8]))])) for n in range(len(data))]


@pytest.mark.parametrize("kind", CHECKED)
def test_flipped_bit_never_gives_other_text_with_checksum(kind: str) -> None:
    rows = read("jsonl", ".jsonl", valid_file("jsonl", ".jsonl"))
    assert all(found in (None, rows) for found in with_one_bit_flipped(kind))


def test_zstd_without_checksum_can_give_other_text() -> None:
    """docs/fuzzing.md names this limit; each row is still a document or a reject."""
    rows = read("jsonl", ".jsonl", valid_file("jsonl", ".jsonl"))
    assert any(found not in (None, rows) for found in with_one_bit_flipped("zstd without checksum"))
