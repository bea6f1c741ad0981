"""Whatever a raw file holds, each row is a document or a reject with its place, or the file is refused by its name."""

import gzip
import io
import json
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from tests.fuzz.mutations import changed, changes, values
from tests.fuzz.properties import few, one_line
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
def whole(format: str, suffix: str) -> bytes:
    """A real file of a kind, small."""
    field = "content" if format == "starcoderdata" else "text"
    rows = [slim(text) if format == "slimpajama" else {field: text, "id": 3} for text in TEXTS]
    match suffix:
        case ".txt":
            return "\n".join(TEXTS).encode()
        case ".csv":
            return b"text,id\r\n" + b"".join(f'"{text.replace(chr(34), chr(34) * 2)}",3\r\n'.encode() for text in TEXTS)
        case ".parquet" | ".arrow":
            return table_bytes(pyarrow.Table.from_pylist(rows), suffix)
    return packed("".join(json.dumps(row) + "\n" for row in rows).encode(), suffix)


def packed(lines: bytes, suffix: str) -> bytes:
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
    """A file's rows, each of which keeps the promise; None where the file was refused in one line."""
    with tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-") as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(data)
        try:
            rows = list(read_rows(str(path), source(format, path)))
        except InputError as error:
            assert str(error).startswith(str(path))
            one_line(error)
            return None
    assert [row.row for row in rows] == list(range(len(rows)))
    for row in rows:
        if isinstance(row, SourceRow):
            assert to_str(row.text).encode()  # not empty, and no half of a surrogate pair
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


def target(format: str, suffix: str) -> tuple[Callable[[bytes], None], Callable[[], list[bytes]]]:
    """What atheris calls for a kind of file, and what it starts from."""

    def call(data: bytes) -> None:
        check(format, suffix, data)

    return call, lambda: [whole(format, suffix)]


@few(400)
@given(place=st.sampled_from(PLACES), todo=changes)
def test_a_changed_file_is_read_row_by_row_or_refused_by_name(place: tuple[str, str], todo: Any) -> None:
    check(*place, changed(whole(*place), todo))


def test_a_table_whose_columns_have_no_name_in_utf8_is_refused() -> None:
    """Found 2026-11-24 by atheris: a traceback."""
    data = whole("parquet", ".parquet")
    assert read("parquet", ".parquet", data.replace(b"id", b"\x9dd")) is None


def test_offsets_of_a_damaged_arrow_file_never_cut_texts_out_of_others() -> None:
    """Found 2026-11-24 by atheris: offsets beyond the file's bytes, or falling, gave other texts or a traceback."""
    data = table_bytes(pyarrow.table({"text": ["first", "second", "third"]}), ".arrow")
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 5, 11, 16))
    for wrong in ((0, 11, 5, 16), (0, 5, 11, 99), (5, 5, 11, 3)):
        assert data.count(offsets) == 1
        assert read("huggingface", ".arrow", data.replace(offsets, struct.pack("<4i", *wrong))) is None
    assert read("huggingface", ".arrow", data) == [SourceRow(0, "first"), SourceRow(1, "second"), SourceRow(2, "third")]


def test_an_arrow_buffer_that_holds_half_a_number_behind_the_last_is_read_as_far_as_rows_go() -> None:
    """Found 2026-11-24 by atheris: a traceback."""
    data = table_bytes(pyarrow.table({"text": ["first", "second", "third"]}), ".arrow")
    place_and_size = struct.pack("<2q", 0, 16)  # of four offsets
    assert data.count(place_and_size) == 1
    for size in (17, 18, 19):
        half_more = data.replace(place_and_size, struct.pack("<2q", 0, size))
        assert read("huggingface", ".arrow", half_more) == [
            SourceRow(0, "first"),
            SourceRow(1, "second"),
            SourceRow(2, "third"),
        ]


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


@few(200)
@given(
    several=lines, end=st.sampled_from([b"\n", b"\r\n"]), bom=st.booleans(), suffix=st.sampled_from(SUFFIXES["jsonl"])
)
def test_every_line_is_a_row_or_a_reject_however_it_is_packed(
    several: list[bytes], end: bytes, bom: bool, suffix: str
) -> None:
    data = b"\xef\xbb\xbf" * bom + b"".join(line + end for line in several)
    plain = read("jsonl", ".jsonl", data)
    check("slimpajama", ".jsonl", data)
    check("jsonl", ".jsonl", data)
    assert read("jsonl", suffix, packed(data, suffix)) == plain
    if packed(data, suffix) != data:
        assert read("jsonl", suffix, packed(data, suffix)[:-1]) is None  # cut by one byte


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


@few(250)
@example([("content", 6)], ("starcoderdata", ".parquet"))  # bytes of fixed length that are no UTF-8 were kept
@example([("text", 9)], ("parquet", ".parquet"))  # a date that Python does not have: a traceback
@example([("text", 0), ("text", 0)], ("huggingface", ".arrow"))  # of two columns of one name: a traceback
@given(chosen=columns, place=st.sampled_from([place for place in PLACES if place[1] in (".parquet", ".arrow")]))
def test_columns_of_any_type_and_name_give_as_many_rows_or_one_line(
    chosen: list[tuple[str, int]], place: tuple[str, str]
) -> None:
    """The examples were found 2026-11-24."""
    table = pyarrow.Table.from_arrays([COLUMNS[number] for _, number in chosen], [name for name, _ in chosen])
    try:
        data = table_bytes(table, place[1])
    except (pyarrow.ArrowException, ValueError):
        return  # a type that this format does not have
    rows = read(*place, data)
    assert rows is None or len(rows) == 3


@few(100)
@example([], [("flip", 0, b"\x80")])  # a name of a column that no terminal can show stood in the message
@given(chosen=st.lists(st.text(max_size=5), max_size=4), todo=changes)
def test_a_csv_file_keeps_its_fields_and_a_changed_one_is_read_or_refused(chosen: list[str], todo: Any) -> None:
    """The example was found 2026-11-24."""
    data = b"text\r\n" + b"".join(b'"' + text.replace('"', '""').encode() + b'"\r\n' for text in chosen)
    rows = read("csv", ".csv", data)
    assert rows == [SourceRow(n, text) if text else RejectedRow(n, "empty text") for n, text in enumerate(chosen)]
    check("csv", ".csv", changed(data, todo))
