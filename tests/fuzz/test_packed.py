"""A changed gzip or zstd file is read or refused by its name, and never as another text where it has a checksum.

gzip always has one; of a zstd frame it is an option, which the `zstd` command writes and `zstandard.compress` does not.
"""

import gzip
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.mutations import changed, changes
from tests.fuzz.properties import few
from tests.fuzz.test_readers import read, whole

CHECKED = {
    "gzip": (".jsonl.gz", lambda lines: gzip.compress(lines, mtime=0)),
    "zstd with checksum": (".jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress),
}
PACKINGS: dict[str, tuple[str, Any]] = {**CHECKED, "zstd without checksum": (".jsonl.zst", zstandard.compress)}


def packed_whole(kind: str) -> tuple[str, bytes]:
    """The suffix and the bytes of a file of a few lines."""
    suffix, pack = PACKINGS[kind]
    return suffix, pack(whole("jsonl", ".jsonl"))


def has_checksum(data: bytes, suffix: str) -> bool:
    """Whether a file that was read to its end still says that it has one: a change may have taken that back."""
    return suffix == ".jsonl.gz" or zstandard.get_frame_parameters(data).has_checksum


@few(100)
@given(kind=st.sampled_from(list(PACKINGS)), todo=changes)
def test_a_changed_packed_file_is_read_or_refused_and_with_a_checksum_never_as_another_text(
    kind: str, todo: Any
) -> None:
    suffix, data = packed_whole(kind)
    rows = read("jsonl", suffix, changed(data, todo))
    if rows is not None and has_checksum(changed(data, todo), suffix):
        assert rows == read("jsonl", ".jsonl", whole("jsonl", ".jsonl"))


def with_one_bit_flipped(kind: str) -> list[Any]:
    """What is read of a file for each byte of it in which one bit is flipped."""
    suffix, data = packed_whole(kind)
    return [read("jsonl", suffix, changed(data, [("flip", n, bytes([1 << n % 8]))])) for n in range(len(data))]


@pytest.mark.parametrize("kind", CHECKED)
def test_no_flipped_bit_gives_another_text_where_there_is_a_checksum(kind: str) -> None:
    rows = read("jsonl", ".jsonl", whole("jsonl", ".jsonl"))
    assert all(found in (None, rows) for found in with_one_bit_flipped(kind))


def test_a_zstd_file_without_checksum_may_be_read_as_another_text() -> None:
    """What docs/fuzzing.md says cannot be found out; each row of it is still a document or a reject."""
    rows = read("jsonl", ".jsonl", whole("jsonl", ".jsonl"))
    assert any(found not in (None, rows) for found in with_one_bit_flipped("zstd without checksum"))
