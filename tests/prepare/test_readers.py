"""Every row of a raw file becomes a document or a rejected row with its reason, or the file is a named error."""

import bz2
import gzip
import lzma
import os
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.strategies import fixed_examples
from tests.prepare.raw import COMPRESSIONS, POINTER, lines, slim, source, texts_of, write

from tinyllama.errors import InputError
from tinyllama.prepare.readers import RejectedRow, SourceRow, read_rows

TOO_LONG = "longer than 256 MiB"


def read(path: Path, format: str, **settings: object) -> list[SourceRow | RejectedRow]:
    return list(read_rows(str(path), source(format, path, **settings)))


# JSON lines


def test_bad_rows_are_rejected_with_place_and_reason(tmp_path: Path) -> None:
    content = lines({"text": "good"}, b'{"text": "cut', {"body": "x"}, {"text": None}, {"text": 3}, {"text": ""}, [1])
    content += b'{"text": "\xff"}\n\n' + lines(b'{"text": "\\ud800"}', {"text": " \n\t"}, {"text": "last"})
    assert read(write(tmp_path / "a.jsonl", content), "jsonl") == [
        SourceRow(0, "good"),
        RejectedRow(1, "invalid JSON"),
        RejectedRow(2, "no text"),
        RejectedRow(3, "no text"),
        RejectedRow(4, "text is not text"),
        RejectedRow(5, "empty text"),
        RejectedRow(6, "not a JSON object"),
        RejectedRow(7, "not UTF-8 text"),
        SourceRow(8, "\ufffd", repaired=True),  # a lone surrogate
        SourceRow(9, " \n\t"),  # blank, but not empty
        SourceRow(10, "last"),
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_long_lines_are_read_from_any_compression(tmp_path: Path, suffix: str) -> None:
    texts = ["a" * 3_000_000, "b", "c\nd" * 700_000]
    content = lines(*({"text": text} for text in texts)).removesuffix(b"\n")
    path = write(tmp_path / f"a.jsonl{suffix}", COMPRESSIONS[suffix](content))
    assert texts_of(source("jsonl", path, max_compression_ratio=10**6)) == texts


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_number_that_orjson_refuses_does_not_reject_the_row(tmp_path: Path, number: str) -> None:
    row = f'{{"text": "kept", "meta": {{"redpajama_set_name": "RedPajamaBook", "score": [{number}]}}}}'
    path = write(tmp_path / "a.jsonl", lines(row.encode()))
    assert read(path, "slimpajama") == [SourceRow(0, "kept", "RedPajamaBook")]


@pytest.mark.parametrize("first", [b"[1]", b'{"text": "cut', b"[2026-11-29] a line of a log", b"]"])
def test_bad_first_line_rejects_only_itself(tmp_path: Path, first: bytes) -> None:
    path = write(tmp_path / "a.jsonl", lines(first, {"text": "row"}))
    assert [type(row) for row in read(path, "jsonl")] == [RejectedRow, SourceRow]


def test_rejected_rows_have_the_line_that_they_end_on(tmp_path: Path) -> None:
    filler = lines(*({"text": "x" * 1000} for _ in range(1500)))  # more than one chunk
    content = b"\n\n" + filler + b"\n" + lines({"body": "no text"}) + b"\r\n" + lines(b"no json")
    rows = read(write(tmp_path / "a.jsonl", content), "jsonl")
    assert [(row.row, row.line) for row in rows if isinstance(row, RejectedRow)] == [(1500, 1504), (1501, 1506)]
    rows = read(write(tmp_path / "a.csv", b'text,id\n"two\nlines",1\n,2\na,b,c\n'), "csv")
    assert [(row.row, row.line) for row in rows if isinstance(row, RejectedRow)] == [(1, 4), (2, 5)]


# Compression


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_truncated_file_is_an_error_with_its_name(tmp_path: Path, suffix: str, kept: float) -> None:
    content = COMPRESSIONS[suffix](lines(*({"text": os.urandom(50).hex()} for _ in range(2000))))
    path = write(tmp_path / f"a.jsonl{suffix}", content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=rf"a.jsonl{suffix}: cannot be read.*fetch it again"):
        read(path, "jsonl")


def test_consecutive_zstd_frames_are_one_file(tmp_path: Path) -> None:
    frames = [zstandard.compress(lines({"text": os.urandom(2000).hex()})) for _ in range(3)]
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"size"  # parallel compressors write these
    path = write(tmp_path / "a.jsonl.zst", skippable + frames[0] + frames[1] + skippable + frames[2])
    assert len(texts_of(source("jsonl", path))) == 3
    write(path, frames[0] + frames[1][:100])
    with pytest.raises(InputError, match=r"a.jsonl.zst: cannot be read"):
        read(path, "jsonl")


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_consecutive_streams_are_one_file_and_nothing_after_one_is_ignored(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESSIONS[suffix]
    first, second = (compress(lines(*({"text": os.urandom(20).hex()} for _ in range(1000)))) for _ in range(2))
    padding = bytes(1 << 21) if suffix == ".xz" else b""
    path = write(tmp_path / f"a.jsonl{suffix}", first + padding + second + padding)
    assert len(texts_of(source("jsonl", path))) == 2000
    damaged = bytearray(second)
    damaged[5] ^= 1
    for wrong in (first[:-5], first + second[:20], first + damaged, first + b"junk"):
        write(path, wrong)
        with pytest.raises(InputError, match=rf"a.jsonl{suffix}: cannot be read .*; fetch it again"):
            read(path, "jsonl")


def jsonl_beginning(beginning: str) -> bytes:
    return beginning.encode() + lines({"text": "row"}, {"text": "row"}) + b"]"


@pytest.mark.parametrize(
    ("name", "content", "keyword"),
    [
        ("a.jsonl.gz", b"{}", "contains plain text, but its name declares gzip; rename it"),
        ("a.jsonl.gz", zstandard.compress(b"{}"), "contains zstd, but its name declares gzip; rename it"),
        ("a.jsonl.zst", b"{}", "contains plain text, but its name declares zstd; rename it"),
        ("a.jsonl.zst", gzip.compress(b"{}", mtime=0), "contains gzip, but its name declares zstd; rename it"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "contains gzip, but its name declares plain text; rename it"),
        ("a.jsonl", zstandard.compress(b"{}"), "contains zstd, but its name declares plain text; rename it"),
        ("a.txt", gzip.compress(b"x", mtime=0), "contains gzip, but its name declares plain text; rename it"),
        ("a.txt.bz2", b"BZh is text", "contains plain text, but its name declares bz2; rename it"),
        ("a.csv", bz2.compress(b"x"), "contains bz2, but its name declares plain text; rename it"),
        ("a.csv", lzma.compress(b"x"), "contains xz, but its name declares plain text; rename it"),
        ("a.jsonl.gz", b"", "empty"),
        ("a.jsonl.zst", b"", "empty"),
        ("a.jsonl", jsonl_beginning("[\n"), "one JSON object per line is expected; .* jq"),
        ("a.jsonl", jsonl_beginning('[{"text": "first"},\n'), "one JSON object per line is expected; .* jq"),
        ("a.jsonl", jsonl_beginning('\ufeff[\n  {"text":'), "one JSON object per line is expected; .* jq"),
        ("a.jsonl", jsonl_beginning("{\n"), "one JSON object per line is expected; .* jq"),
        ("a.jsonl", jsonl_beginning(" { \r\n"), "one JSON object per line is expected; .* jq"),
        ("a.csv", b'text\n"a" b\n', "line 2: .*double each"),
        ("a.csv", b'text\n"a\n', r"unexpected end of data\); close the quote"),
        ("a.csv", b"id;text\n1;a\n", "separated by ';'; convert the file"),
        ("a.csv", b"id\ttext\n1\ta\n", r"separated by '\\t'; convert the file"),
        ("a.csv", "text\na\n".encode("utf-16"), "not UTF-8; convert the file"),
        ("a.csv", "té,text\na,b\n".encode("latin-1"), "not UTF-8; convert the file"),
        ("a.csv", b"", "empty"),
        ("a.csv", b"body\nx\n", r"no column 'text' \(it has body\)"),
    ],
)
def test_file_of_another_kind_is_an_error_with_its_remedy(
    tmp_path: Path, name: str, content: bytes, keyword: str
) -> None:
    format = {"jsonl": "jsonl", "txt": "text", "csv": "csv"}[name.split(".")[1]]
    with pytest.raises(InputError, match=rf"{name}: .*{keyword}"):
        read(write(tmp_path / name, content), format)


ANNEX = b"/annex/objects/SHA256E-s12345--" + b"4d7a" * 16 + b".parquet\n"


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("text", "a.txt"),
        ("text", "a.txt.gz"),
        ("jsonl", "a.jsonl"),
        ("jsonl", "a.jsonl.zst"),
        ("csv", "a.csv"),
        ("parquet", "a.parquet"),
        ("huggingface", "a.arrow"),
        ("slimpajama", "a.jsonl.xz"),
        ("starcoderdata", "python/a.parquet"),
    ],
)
@pytest.mark.parametrize(("pointer", "command"), [(POINTER, "git lfs pull"), (ANNEX, "git annex get")])
def test_git_pointer_is_an_error_with_the_command_to_fetch(
    tmp_path: Path, format: str, name: str, pointer: bytes, command: str
) -> None:
    write(tmp_path / name, pointer)
    with pytest.raises(InputError, match=rf"{name}: a git-\w+ pointer, .*run `{command}`"):
        texts_of(source(format, tmp_path))


def test_text_about_pointers_is_not_a_pointer(tmp_path: Path) -> None:
    text = f"A pointer reads:\n{POINTER.decode()}"
    assert texts_of(source("text", write(tmp_path / "a.txt", text.encode()))) == [text]


# SlimPajama


@pytest.mark.parametrize("form", ["object", "json", "repr", "flat"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_slimpajama_subset_is_found_in_every_form(tmp_path: Path, form: str, suffix: str) -> None:
    def row(subset: str) -> dict[str, object]:
        forms: dict[str, dict[str, object]] = {
            "object": {"meta": {"redpajama_set_name": subset}},
            "json": {"meta": f'{{"redpajama_set_name": "{subset}"}}'},
            "repr": {"meta": f"{{'redpajama_set_name': '{subset}'}}"},
            "flat": {"redpajama_set_name": subset},
        }
        return {"text": f"from {subset}", **forms[form]}

    rows = [row(subset) for subset in ("RedPajamaC4", "RedPajamaGithub", "RedPajamaBook")]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(path, COMPRESSIONS[suffix.removeprefix(".jsonl")](lines(*rows)))
    assert read(path, "slimpajama", exclude=["RedPajamaGithub"]) == [
        SourceRow(0, "from RedPajamaC4", "RedPajamaC4"),
        RejectedRow(1, "excluded: RedPajamaGithub", is_intentional=True),
        SourceRow(2, "from RedPajamaBook", "RedPajamaBook"),
    ]
    assert texts_of(source("slimpajama", path, include=["RedPajamaBook"])) == ["from RedPajamaBook"]


@pytest.mark.parametrize("meta", [None, {}, "{}", "{'a'", "[" * 5000, "x" * 20_000, 3, {"redpajama_set_name": 1}])
def test_row_without_a_subset_is_rejected(tmp_path: Path, meta: object) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "whose?", "meta": meta}, slim("known")))
    assert read(path, "slimpajama") == [
        RejectedRow(0, "no meta.redpajama_set_name"),
        SourceRow(1, "known", "RedPajamaC4"),
    ]


@pytest.mark.parametrize(
    "meta", ['{"redpajama_set_name": "X", "score": NaN}', "{'redpajama_set_name': 'X', 'a': -inf}"]
)
def test_subset_is_found_next_to_nan_and_infinity(tmp_path: Path, meta: str) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "kept", "meta": meta}))
    assert read(path, "slimpajama") == [SourceRow(0, "kept", "X")]


# Parquet and arrow


@pytest.mark.parametrize(
    ("format", "present", "missing"),
    [
        ("parquet", "body", "'text'"),
        ("huggingface", "body", "'text'"),
        ("slimpajama", "text", "'meta' or 'redpajama_set_name'"),
    ],
)
def test_missing_column_is_an_error_with_the_present_ones(
    tmp_path: Path, format: str, present: str, missing: str
) -> None:
    pyarrow.parquet.write_table(pyarrow.table({present: ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=rf"a.parquet: no column {missing} \(it has {present}\)"):
        read(tmp_path / "a.parquet", format)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_bad_values_of_a_table_are_rejected(tmp_path: Path, suffix: str, kind: Any) -> None:
    values = [b"first", b"\xff\xfe", None, b"", "ü😀 ".encode(), b"last"]
    binary = pyarrow.large_binary() if kind == pyarrow.large_string() else pyarrow.binary()
    table = pyarrow.table({"id": range(6), "text": pyarrow.array(values, binary).view(kind)})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=4)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    assert read(path, "huggingface") == [
        SourceRow(0, "first"),
        RejectedRow(1, "text is not UTF-8"),
        RejectedRow(2, "no text"),
        RejectedRow(3, "empty text"),
        SourceRow(4, "ü😀 "),
        SourceRow(5, "last"),
    ]


def test_dictionary_column_is_text_and_number_column_is_not(tmp_path: Path) -> None:
    path, words = tmp_path / "a.parquet", pyarrow.array(["one", "two", "one"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": words, "number": [1, 2, 3]}), path)
    assert texts_of(source("parquet", path)) == ["one", "two", "one"]
    assert read(path, "parquet", text="number")[0] == RejectedRow(0, "number is not text")


def test_arrow_file_format_is_read_and_truncated_stream_is_an_error(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"row {number}" for number in range(100)]})
    path = tmp_path / "file.arrow"
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    assert texts_of(source("huggingface", path)) == table["text"].to_pylist()
    data = path.read_bytes()
    write(tmp_path / "aligned/file.arrow", data[:8] + bytes(56) + data[8:])  # padded as by arrow-rs
    assert texts_of(source("huggingface", tmp_path / "aligned/file.arrow")) == table["text"].to_pylist()
    write(path, data[:-1])
    with pytest.raises(InputError, match=r"file.arrow: cannot be read .the arrow stream is truncated"):
        read(path, "huggingface")
    with pyarrow.ipc.new_stream(tmp_path / "cut.arrow", table.schema) as writer:
        writer.write_table(table.slice(0, 50), max_chunksize=10)
    write(tmp_path / "cut.arrow", (tmp_path / "cut.arrow").read_bytes()[:-8])
    with pytest.raises(InputError, match=r"cut.arrow: cannot be read \(the arrow stream is truncated\)"):
        read(tmp_path / "cut.arrow", "huggingface")


# Text and csv


def test_text_file_is_one_document(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", "a page\nof ü".encode()), "text") == [SourceRow(0, "a page\nof ü")]
    for name, content in {"b.txt": b"\xff\xfe", "b.log": "log".encode("utf-16-le"), "b.o": b"\x7fELF\0\0"}.items():
        assert read(write(tmp_path / name, content), "text") == [RejectedRow(0, "not UTF-8 text")]
    only_byte_order_mark = write(tmp_path / "c.txt", b"\xef\xbb\xbf")
    assert read(only_byte_order_mark, "text") == [RejectedRow(0, "empty text")]


PARTS = st.lists(st.sampled_from(["a", "b ", "é", "\n", "\r\n", "<|", "|>", "<|x|>", "-", "--", " "]), max_size=40)


@fixed_examples(300)
@given(parts=PARTS, separator=st.sampled_from(["\n", "\n\n", "<|x|>", "--", "\n--\n", "é"]), size=st.integers(1, 9))
def test_text_is_split_at_separators_wherever_chunks_end(parts: list[str], separator: str, size: int) -> None:
    text = "".join(parts)
    if separator.strip("\n"):
        expected = text.split(separator)
    else:
        expected = [part.strip("\r\n") for part in re.split(rf"(?:\r?\n){{{len(separator)},}}", text)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyllama.prepare.streams.CHUNK_BYTES", size)
        found = read(write(Path(folder) / "a.txt", text.encode()), "text", separator=separator)
    assert found == [SourceRow(*row) for row in enumerate(part for part in expected if part.strip())]


def test_separated_documents_are_rows_or_rejected(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbffirst\n\nsecond\nline\n\n\n\n\xff\r\n\r\nlast\n"
    for path in (write(tmp_path / "a.txt", content), write(tmp_path / "b.txt.zst", zstandard.compress(content))):
        assert read(path, "text", separator=r"\n\n") == [  # as a shell or YAML's single quotes pass it on
            SourceRow(0, "first"),
            SourceRow(1, "second\nline"),
            RejectedRow(2, "not UTF-8 text"),
            SourceRow(3, "last"),
        ]


@pytest.mark.parametrize("end", ["", "<|endoftext|>last"])
def test_too_long_document_is_rejected_and_later_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr("tinyllama.prepare.streams.LONGEST_BYTES", 3 << 20)
    text = "first<|endoftext|>" + "no separator " * 400_000 + end
    found = read(write(tmp_path / "a.txt", text.encode()), "text", separator="<|endoftext|>")
    assert found == [SourceRow(0, "first"), RejectedRow(1, TOO_LONG), *([SourceRow(2, "last")] if end else [])]


def test_csv_rows_keep_their_lines_and_bad_ones_are_rejected(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfbody,id\n"two\nlines",1\n,2\nlatin \xfc,3\nunquoted, comma,4\nshort\n'
    assert read(write(tmp_path / "a.csv", content), "csv", text="body") == [
        SourceRow(0, "two\nlines"),
        RejectedRow(1, "empty body"),
        RejectedRow(2, "body is not UTF-8"),
        RejectedRow(3, "more fields than columns"),
        SourceRow(4, "short"),
    ]
