"""For any raw file, each row is a document or a reject with its position, or the file is refused by name."""

import gzip
import io
import json
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from tests.fuzz.strategies import assert_one_line, edited, edits_of_bytes, fixed_examples, values
from tests.prepare.raw import slim, source

from tinyllama.errors import InputError
from tinyllama.prepare.readers import RejectedRow, SourceRow, read_rows
from tinyllama.text import to_str

SUFFIXES = {
    "jsonl": [".jsonl", ".jsonl.gz", ".jsonl.zst"],
    "slimpajama": [".jsonl", ".jsonl.zst", ".parquet"],
    "starcoderdata": [".parquet"],
    "parquet": [".parquet"],
    "text": [".txt"],
    "csv": [".csv"],
    "huggingface": [".parquet", ".arrow", ".json", ".csv"],
}
PLACES = [(format, suffix) for format, suffixes in SUFFIXES.items() for suffix in suffixes]
TEXTS = ["plain", "", "two\nlines", "ü😀", " ", "a\0b", 'quo"ted, text', "</s>", "x" * 300]


@cache
def valid_file(format: str, suffix: str) -> bytes:
    """Return a small valid file of a format."""
    field = "content" if format == "starcoderdata" else "text"
    rows = [slim(text) if format == "slimpajama" else {field: text, "id": 3} for text in TEXTS]
    match suffix:
        case ".txt":
            return "\n".join(TEXTS).encode()
        case ".csv":
            return b"text,id\r\n" + b"".join(f'"{text.replace(chr(34), chr(34) * 2)}",3\r\n'.encode() for text in TEXTS)
        case ".parquet" | ".arrow":
            return table_bytes(pyarrow.Table.from_pylist(rows), suffix)
    return compress("".join(json.dumps(row) + "\n" for row in rows).encode(), suffix)


def compress(lines: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(lines, mtime=0)
    return zstandard.compress(lines) if suffix.endswith(".zst") else lines


def table_bytes(table: Any, suffix: str) -> bytes:
    out = io.BytesIO()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, out, row_group_size=4)
    else:
        with pyarrow.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    return out.getvalue()


def read(format: str, suffix: str, data: bytes) -> list[SourceRow | RejectedRow] | None:
    """Return a file's rows and check each of them; None if the file was refused in one line."""
    with tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-") as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(data)
        try:
            rows = list(read_rows(str(path), source(format, path)))
        except InputError as error:
            assert str(error).startswith(str(path))
            assert_one_line(error)
            return None
    assert [row.row for row in rows] == list(range(len(rows)))
    for row in rows:
        if isinstance(row, SourceRow):
            assert to_str(row.text).encode()  # not empty, and no lone surrogate
            row.subset.encode()
        else:
            assert len(row.reason.splitlines()) == 1
            row.reason.encode()
    return rows


def check(format: str, suffix: str, data: bytes) -> None:
    rows = read(format, suffix, data)
    if rows is not None and suffix == ".jsonl":
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert len(rows) == sum(bool(line) and not line.isspace() for line in lines)


@fixed_examples(400)
@given(place=st.sampled_from(PLACES), edits=edits_of_bytes)
def test_edited_file_is_read_or_refused_by_name(place: tuple[str, str], edits: Any) -> None:
    check(*place, edited(valid_file(*place), edits))


def test_column_name_that_is_not_utf8_is_refused() -> None:
    """Found 2026-11-24 by atheris: a traceback."""
    data = valid_file("parquet", ".parquet")
    assert read("parquet", ".parquet", data.replace(b"id", b"\x9dd")) is None


def test_damaged_arrow_buffers_are_refused_and_padded_ones_read() -> None:
    """Found 2026-11-24: offsets beyond the file, or decreasing ones, gave other texts or a traceback."""
    data = table_bytes(pyarrow.table({"text": ["first", "second", "third"]}), ".arrow")
    expected = [SourceRow(0, "first"), SourceRow(1, "second"), SourceRow(2, "third")]
    assert read("huggingface", ".arrow", data) == expected
    offsets, place_and_size = struct.pack("<4i", 0, 5, 11, 16), struct.pack("<2q", 0, 16)
    assert data.count(offsets) == data.count(place_and_size) == 1
    for wrong in ((0, 11, 5, 16), (0, 5, 11, 99), (5, 5, 11, 3)):
        assert read("huggingface", ".arrow", data.replace(offsets, struct.pack("<4i", *wrong))) is None
    for size in (17, 18, 19):
        padded = data.replace(place_and_size, struct.pack("<2q", 0, size))
        assert read("huggingface", ".arrow", padded) == expected


keys = st.sampled_from(["text", "meta", "redpajama_set_name", "id"]) | st.text(max_size=3)
subsets = st.sampled_from(
    ["RedPajamaC4", "other", "\ud800", "{'redpajama_set_name': 'x'}", '{"redpajama_set_name": 1}']
)
fields = st.dictionaries(keys, values | subsets | st.fixed_dictionaries({"redpajama_set_name": subsets}), max_size=4)
lines = st.lists(
    (fields | values).map(lambda row: json.dumps(row).encode())
    | fields.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    | st.binary(max_size=20)
    | st.sampled_from([b"", b" ", b"\r", b'{"text": "a", "text": "b"}', b'{"text": "a"} {}', b"[" * 3000, b"1e999"]),
    max_size=6,
)


@fixed_examples(200)
@given(
    several=lines, end=st.sampled_from([b"\n", b"\r\n"]), bom=st.booleans(), suffix=st.sampled_from(SUFFIXES["jsonl"])
)
def test_every_line_is_a_row_or_a_reject_in_any_compression(
    several: list[bytes], end: bytes, bom: bool, suffix: str
) -> None:
    data = b"\xef\xbb\xbf" * bom + b"".join(line + end for line in several)
    plain = read("jsonl", ".jsonl", data)
    check("slimpajama", ".jsonl", data)
    check("jsonl", ".jsonl", data)
    assert read("jsonl", suffix, compress(data, suffix)) == plain
    if compress(data, suffix) != data:
        assert read("jsonl", suffix, compress(data, suffix)[:-1]) is None  # truncated by one byte


COLUMNS = [
    pyarrow.array(["a", None, ""]),
    pyarrow.array([b"a", b"\xff", None]),
    pyarrow.array(["a", "b", "a"]).dictionary_encode(),
    pyarrow.array(["a", None, "b"], pyarrow.large_string()),
    pyarrow.array(["a", None, "b" * 40], pyarrow.string_view()),
    pyarrow.array([b"a", None, b"b" * 40], pyarrow.binary_view()),
    pyarrow.array([b"ab", b"\xff\xfe", None], pyarrow.binary(2)),
    pyarrow.array([1, None, 3]),
    pyarrow.array([True, False, None]),
    pyarrow.array([2**62, None, -1], pyarrow.timestamp("us")),
    pyarrow.array([2**62, None, -1], pyarrow.timestamp("s", "Nowhere/Land")),
    pyarrow.array([2**31 - 1, None, -(2**31)], pyarrow.date32()),
    pyarrow.array([["a"], None, []]),
    pyarrow.array([{"redpajama_set_name": "RedPajamaC4"}, None, {}]),
    pyarrow.array([{"text": "a"}, {"text": None}, None]),
    pyarrow.nulls(3),
]
columns = st.lists(
    st.tuples(
        st.sampled_from(["text", "meta", "content", "redpajama_set_name", "", "text.x"]),
        st.integers(0, len(COLUMNS) - 1),
    ),
    max_size=4,
)


@fixed_examples(250)
@example([("content", 6)], ("starcoderdata", ".parquet"))  # bytes of fixed length that are not UTF-8 were kept
@example([("text", 9)], ("parquet", ".parquet"))  # a date that Python cannot represent: a traceback
@example([("text", 0), ("text", 0)], ("huggingface", ".arrow"))  # two columns with one name: a traceback
@given(chosen=columns, place=st.sampled_from([place for place in PLACES if place[1] in (".parquet", ".arrow")]))
def test_columns_of_any_type_and_name_are_read_or_refused(
    chosen: list[tuple[str, int]], place: tuple[str, str]
) -> None:
    """Examples: found 2026-11-24."""
    table = pyarrow.Table.from_arrays([COLUMNS[number] for _, number in chosen], [name for name, _ in chosen])
    try:
        data = table_bytes(table, place[1])
    except (pyarrow.ArrowException, ValueError):
        return  # the format does not support the type
    rows = read(*place, data)
    assert rows is None or len(rows) == 3


@fixed_examples(100)
@example([], [(0, 1, b"\xf4")])  # the message contained an unprintable column name
@given(chosen=st.lists(st.text(max_size=5), max_size=4), edits=edits_of_bytes)
def test_csv_fields_are_kept_and_edited_file_is_read_or_refused(chosen: list[str], edits: Any) -> None:
    """Example: found 2026-11-24."""
    data = b"text\r\n" + b"".join(b'"' + text.replace('"', '""').encode() + b'"\r\n' for text in chosen)
    rows = read("csv", ".csv", data)
    assert rows == [SourceRow(n, text) if text else RejectedRow(n, "empty text") for n, text in enumerate(chosen)]
    check("csv", ".csv", edited(data, edits))


COMPRESSIONS: dict[str, tuple[str, Any]] = {
    "gzip": (".jsonl.gz", gzip.compress),
    "zstd with checksum": (".jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress),
    "zstd without checksum": (".jsonl.zst", zstandard.compress),
}


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_only_a_compressed_file_without_checksum_can_give_other_text(kind: str) -> None:
    """Flip one bit of each byte in turn. docs/fuzzing.md names the limit of zstd files without a checksum."""
    lines = valid_file("jsonl", ".jsonl")
    suffix, compress_lines = COMPRESSIONS[kind]
    data = compress_lines(lines)
    found = [
        read("jsonl", suffix, edited(data, [(place, 1, bytes([byte ^ 1 << place % 8]))]))
        for place, byte in enumerate(data)
    ]
    is_exact = all(rows in (None, read("jsonl", ".jsonl", lines)) for rows in found)
    assert is_exact == (kind != "zstd without checksum")
