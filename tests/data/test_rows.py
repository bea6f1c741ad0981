"""Raw rows become documents, rejects or a named error: never silence."""

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from tests.data.raw import lines, slim, source, texts_of, write

from tinyllama.data.sources import Reject, Row, read_rows
from tinyllama.errors import InputError


def test_every_bad_row_is_a_reject_with_its_place_and_reason(tmp_path: Path) -> None:
    content = lines({"text": "good"}, b'{"text": "cut', {"body": "x"}, {"text": None}, {"text": 3}, {"text": ""}, [1])
    content += b'{"text": "\xff"}\n\n' + lines(b'{"text": "\\ud800"}', {"text": " \n\t"}, {"text": "last"})
    path = write(tmp_path / "a.jsonl", content)
    assert list(read_rows(str(path), source("jsonl", path))) == [
        Row(0, "good"),
        Reject(1, "invalid JSON"),
        Reject(2, "no text"),
        Reject(3, "no text"),
        Reject(4, "text is not text"),
        Reject(5, "empty text"),
        Reject(6, "not a JSON object"),
        Reject(7, "not UTF-8 text"),  # bytes that are not UTF-8
        Reject(8, "invalid JSON"),  # half of a surrogate pair
        Row(9, " \n\t"),  # blank, but not empty
        Row(10, "last"),
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_of_any_length_read_the_same_from_any_compression(tmp_path: Path, suffix: str) -> None:
    texts = ["a" * 3_000_000, "b", "c\nd" * 700_000]
    content = lines(*({"text": text} for text in texts)).removesuffix(b"\n")
    packed = {"": content, ".gz": gzip.compress(content), ".zst": zstandard.compress(content)}[suffix]
    assert texts_of(source("jsonl", write(tmp_path / f"a.jsonl{suffix}", packed))) == texts


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_end_as_unix_or_windows_ends_them_wherever_blocks_are_cut(tmp_path: Path, end: bytes) -> None:
    texts = [str(number) * 1000 for number in range(1000)]
    content = b"".join(line + end for line in lines(*({"text": text} for text in texts)).splitlines())
    path = write(tmp_path / "a.jsonl", content + end)
    assert list(read_rows(str(path), source("jsonl", path))) == [Row(*row) for row in enumerate(texts)]


def test_a_file_that_is_all_one_line_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllama.data.lines._LONGEST_LINE_BYTES", 3 << 20)
    path = write(tmp_path / "a.jsonl", b"[" + b'{"text": "no object a line"}, ' * 200_000)
    with pytest.raises(InputError, match=r"a.jsonl: a line of more than 1 GiB; write one JSON object a line"):
        list(read_rows(str(path), source("jsonl", path)))


def test_zstd_frames_one_after_the_other_are_one_file(tmp_path: Path) -> None:
    frames = [zstandard.compress(lines({"text": word})) for word in ("one", "two", "three")]
    skipped = struct.pack("<II", 0x184D2A50, 4) + b"size"  # parallel packers put these between and before
    path = write(tmp_path / "a.jsonl.zst", skipped + frames[0] + frames[1] + skipped + frames[2])
    assert texts_of(source("jsonl", path)) == ["one", "two", "three"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_a_file_cut_in_the_middle_raises_with_its_name(tmp_path: Path, suffix: str, kept: float) -> None:
    content = lines(*({"text": os.urandom(50).hex()} for _ in range(2000)))
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    path = write(tmp_path / f"a.jsonl{suffix}", packed[: int(len(packed) * kept)])
    with pytest.raises(InputError, match=rf"a.jsonl{suffix}: cannot be read to its end.*fetch it again"):
        list(read_rows(str(path), source("jsonl", path)))


def test_a_second_frame_that_is_cut_raises_too(tmp_path: Path) -> None:
    frame = zstandard.compress(lines({"text": os.urandom(2000).hex()}))
    path = write(tmp_path / "a.jsonl.zst", frame + frame[:100])
    with pytest.raises(InputError, match=r"a.jsonl.zst: cannot be read to its end"):
        list(read_rows(str(path), source("jsonl", path)))


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("a.jsonl.gz", "plain text"),
        ("a.jsonl.gz", "zstd"),
        ("a.jsonl.zst", "plain text"),
        ("a.jsonl.zst", "gzip"),
        ("a.jsonl", "gzip"),
        ("a.jsonl", "zstd"),
    ],
)
def test_a_file_that_lies_about_its_format_is_refused_by_name(tmp_path: Path, name: str, holds: str) -> None:
    content = lines({"text": "here"})
    packed = {"plain text": content, "gzip": gzip.compress(content), "zstd": zstandard.compress(content)}[holds]
    path = write(tmp_path / name, packed)
    with pytest.raises(InputError, match=rf"{name}: holds {holds}, not .* as its name says; rename it"):
        list(read_rows(str(path), source("jsonl", path)))


def test_an_empty_file_has_no_rows_but_an_empty_archive_is_an_error(tmp_path: Path) -> None:
    assert texts_of(source("jsonl", write(tmp_path / "a.jsonl", b""))) == []
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        with pytest.raises(InputError, match=rf"{name}: is empty; fetch it again"):
            texts_of(source("jsonl", write(tmp_path / name, b"")))


def test_a_byte_order_mark_belongs_to_no_row(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + lines({"text": "first"}, {"text": "second"})
    assert texts_of(source("jsonl", write(tmp_path / "a.jsonl", content))) == ["first", "second"]


def _meta_forms(subset: str) -> dict[str, Any]:
    return {
        "object": {"redpajama_set_name": subset},
        "json": f'{{"redpajama_set_name": "{subset}"}}',
        "repr": f"{{'redpajama_set_name': '{subset}'}}",
    }


@pytest.mark.parametrize("form", ["object", "json", "repr", "flat"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_slimpajama_knows_subsets_in_every_form_and_container(tmp_path: Path, form: str, suffix: str) -> None:
    subsets = ["RedPajamaC4", "RedPajamaGithub", "RedPajamaBook"]
    rows = [
        {"text": f"from {subset}"}
        | ({"redpajama_set_name": subset} if form == "flat" else {"meta": _meta_forms(subset)[form]})
        for subset in subsets
    ]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        content = lines(*rows)
        packed = {".jsonl": content, ".jsonl.gz": gzip.compress(content), ".jsonl.zst": zstandard.compress(content)}
        write(path, packed[suffix])
    without = source("slimpajama", path, exclude=["RedPajamaGithub"])
    assert list(read_rows(str(path), without)) == [
        Row(0, "from RedPajamaC4", "RedPajamaC4"),
        Reject(1, "excluded: RedPajamaGithub", counted_only=True),
        Row(2, "from RedPajamaBook", "RedPajamaBook"),
    ]
    only = source("slimpajama", path, include=["RedPajamaBook"])
    assert [row.text for row in read_rows(str(path), only) if isinstance(row, Row)] == ["from RedPajamaBook"]


@pytest.mark.parametrize("meta", [None, {}, "{}", "{'a'", "[" * 5000, "x" * 20_000, 3, {"redpajama_set_name": 1}])
def test_a_row_that_does_not_say_its_subset_is_a_reject(tmp_path: Path, meta: object) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "whose?", "meta": meta}, slim("known")))
    assert list(read_rows(str(path), source("slimpajama", path))) == [
        Reject(0, "no meta.redpajama_set_name"),
        Row(1, "known", "RedPajamaC4"),
    ]


def test_a_table_without_the_column_is_named_with_what_it_has(tmp_path: Path) -> None:
    table = pyarrow.table({"body": ["x"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: no column 'text' \(it has body\)"):
        texts_of(source("parquet", tmp_path))
    with pytest.raises(InputError, match=r"a.parquet: no column 'text' \(it has body\)"):
        texts_of(source("huggingface", tmp_path))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "slim.parquet")
    with pytest.raises(InputError, match=r"no column 'meta' or 'redpajama_set_name' \(it has text\)"):
        texts_of(source("slimpajama", tmp_path / "slim.parquet"))
    path = write(tmp_path / "a.csv", b"body\nx\n")
    with pytest.raises(InputError, match=r"a.csv: no column 'text' \(it has body\)"):
        texts_of(source("csv", path))
    broken = write(tmp_path / "b.parquet", b"PAR1 not really")
    with pytest.raises(InputError, match=r"b.parquet: cannot be read to its end"):
        texts_of(source("parquet", broken))


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_s_bad_rows_are_rejects_and_its_good_ones_are_kept(tmp_path: Path, suffix: str, kind: Any) -> None:
    values = [b"first", b"\xff\xfe", None, b"", "ü😀 ".encode(), b"last"]
    column = pyarrow.array(values, pyarrow.large_binary()).cast(pyarrow.large_binary())
    column = column.cast(pyarrow.binary()).view(kind) if kind != pyarrow.large_string() else column.view(kind)
    table = pyarrow.table({"id": range(6), "text": column})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=4)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    assert list(read_rows(str(path), source("huggingface", path))) == [
        Row(0, "first"),
        Reject(1, "text is not UTF-8"),
        Reject(2, "no text"),
        Reject(3, "empty text"),
        Row(4, "ü😀 "),
        Row(5, "last"),
    ]


def test_dictionary_columns_and_columns_of_another_type_are_told_apart(tmp_path: Path) -> None:
    words = pyarrow.array(["one", "two", "one"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": words, "number": [1, 2, 3]}), tmp_path / "a.parquet")
    assert texts_of(source("parquet", tmp_path)) == ["one", "two", "one"]
    numbers = source("parquet", tmp_path, text="number")
    assert next(iter(read_rows(str(tmp_path / "a.parquet"), numbers))) == Reject(0, "number is not text")


def test_arrow_s_file_format_is_read_and_a_stream_cut_between_batches_is_an_error(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"row {number}" for number in range(100)]})
    with pyarrow.ipc.new_file(tmp_path / "whole.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    assert texts_of(source("huggingface", tmp_path / "whole.arrow")) == table["text"].to_pylist()
    with pyarrow.ipc.new_stream(tmp_path / "cut.arrow", table.schema) as writer:
        writer.write_table(table.slice(0, 50), max_chunksize=10)
    write(tmp_path / "cut.arrow", (tmp_path / "cut.arrow").read_bytes()[:-8])
    with pytest.raises(InputError, match=r"cut.arrow: cannot be read to its end \(the arrow stream is cut off\)"):
        texts_of(source("huggingface", tmp_path / "cut.arrow"))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a page\nof text ü".encode())
    assert list(read_rows(str(path), source("text", path))) == [Row(0, "a page\nof text ü")]
    path = write(tmp_path / "b.txt", b"\xff\xfe")
    assert list(read_rows(str(path), source("text", path))) == [Reject(0, "not UTF-8 text")]
    path = write(tmp_path / "c.txt", b"\xef\xbb\xbf")  # no more than a byte order mark
    assert list(read_rows(str(path), source("text", path))) == [Reject(0, "empty text")]


def test_csv_rows_keep_their_lines_and_bad_ones_are_rejects(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfbody,id\n"two\nlines",1\n,2\nlatin \xfc,3\nunquoted, comma,4\nshort\n'
    path = write(tmp_path / "a.csv", content)
    assert list(read_rows(str(path), source("csv", path, text="body"))) == [
        Row(0, "two\nlines"),
        Reject(1, "empty body"),
        Reject(2, "body is not UTF-8"),
        Reject(3, "more fields than columns"),
        Row(4, "short"),
    ]


def test_a_csv_cut_inside_quotes_raises_with_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'text\nwhole\n"cut in the mid')
    with pytest.raises(InputError, match=r"a.csv: cannot be read to its end"):
        list(read_rows(str(path), source("csv", path)))
