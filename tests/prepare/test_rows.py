"""Raw rows become documents, rejects or a named error: never silence."""

import bz2
import gzip
import lzma
import os
import re
import struct
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.properties import few
from tests.prepare.raw import lines, slim, source, texts_of, write

from tinyllama.errors import InputError
from tinyllama.prepare.readers import RejectedRow, SourceRow, read_rows


def test_every_bad_row_is_a_reject_with_its_place_and_reason(tmp_path: Path) -> None:
    content = lines({"text": "good"}, b'{"text": "cut', {"body": "x"}, {"text": None}, {"text": 3}, {"text": ""}, [1])
    content += b'{"text": "\xff"}\n\n' + lines(b'{"text": "\\ud800"}', {"text": " \n\t"}, {"text": "last"})
    path = write(tmp_path / "a.jsonl", content)
    assert list(read_rows(str(path), source("jsonl", path))) == [
        SourceRow(0, "good"),
        RejectedRow(1, "invalid JSON"),
        RejectedRow(2, "no text"),
        RejectedRow(3, "no text"),
        RejectedRow(4, "text is not text"),
        RejectedRow(5, "empty text"),
        RejectedRow(6, "not a JSON object"),
        RejectedRow(7, "not UTF-8 text"),  # bytes that are not UTF-8
        SourceRow(8, "\ufffd", repaired=True),  # half of a surrogate pair
        SourceRow(9, " \n\t"),  # blank, but not empty
        SourceRow(10, "last"),
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
    assert list(read_rows(str(path), source("jsonl", path))) == [SourceRow(*row) for row in enumerate(texts)]


def test_a_line_that_no_reader_holds_is_rejected_and_the_rows_after_it_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllama.prepare.streams.LONGEST_BYTES", 3 << 20)
    content = (
        lines({"text": "one"}) + b"[" + b'{"text": "no object a line"}, ' * 200_000 + b"]\n" + lines({"text": "two"})
    )
    path = write(tmp_path / "a.jsonl", b"\n" + content)
    too_long = RejectedRow(1, "longer than 256 MiB", line=3)
    assert list(read_rows(str(path), source("jsonl", path))) == [SourceRow(0, "one"), too_long, SourceRow(2, "two")]


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
    with pytest.raises(InputError, match=rf"{name}: contains {holds}, but its name declares .*; rename it"):
        list(read_rows(str(path), source("jsonl", path)))


def test_an_empty_file_has_no_rows_but_an_empty_archive_is_an_error(tmp_path: Path) -> None:
    assert texts_of(source("jsonl", write(tmp_path / "a.jsonl", b""))) == []
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        with pytest.raises(InputError, match=rf"{name}: empty; fetch it again"):
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
        SourceRow(0, "from RedPajamaC4", "RedPajamaC4"),
        RejectedRow(1, "excluded: RedPajamaGithub", is_intentional=True),
        SourceRow(2, "from RedPajamaBook", "RedPajamaBook"),
    ]
    only = source("slimpajama", path, include=["RedPajamaBook"])
    assert [row.text for row in read_rows(str(path), only) if isinstance(row, SourceRow)] == ["from RedPajamaBook"]


@pytest.mark.parametrize("meta", [None, {}, "{}", "{'a'", "[" * 5000, "x" * 20_000, 3, {"redpajama_set_name": 1}])
def test_a_row_that_does_not_say_its_subset_is_a_reject(tmp_path: Path, meta: object) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "whose?", "meta": meta}, slim("known")))
    assert list(read_rows(str(path), source("slimpajama", path))) == [
        RejectedRow(0, "no meta.redpajama_set_name"),
        SourceRow(1, "known", "RedPajamaC4"),
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
        SourceRow(0, "first"),
        RejectedRow(1, "text is not UTF-8"),
        RejectedRow(2, "no text"),
        RejectedRow(3, "empty text"),
        SourceRow(4, "ü😀 "),
        SourceRow(5, "last"),
    ]


def test_dictionary_columns_and_columns_of_another_type_are_told_apart(tmp_path: Path) -> None:
    words = pyarrow.array(["one", "two", "one"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": words, "number": [1, 2, 3]}), tmp_path / "a.parquet")
    assert texts_of(source("parquet", tmp_path)) == ["one", "two", "one"]
    numbers = source("parquet", tmp_path, text="number")
    assert next(iter(read_rows(str(tmp_path / "a.parquet"), numbers))) == RejectedRow(0, "number is not text")


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
    assert list(read_rows(str(path), source("text", path))) == [SourceRow(0, "a page\nof text ü")]
    path = write(tmp_path / "b.txt", b"\xff\xfe")
    assert list(read_rows(str(path), source("text", path))) == [RejectedRow(0, "not UTF-8 text")]
    path = write(tmp_path / "c.txt", b"\xef\xbb\xbf")  # no more than a byte order mark
    assert list(read_rows(str(path), source("text", path))) == [RejectedRow(0, "empty text")]


def test_csv_rows_keep_their_lines_and_bad_ones_are_rejects(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfbody,id\n"two\nlines",1\n,2\nlatin \xfc,3\nunquoted, comma,4\nshort\n'
    path = write(tmp_path / "a.csv", content)
    assert list(read_rows(str(path), source("csv", path, text="body"))) == [
        SourceRow(0, "two\nlines"),
        RejectedRow(1, "empty body"),
        RejectedRow(2, "body is not UTF-8"),
        RejectedRow(3, "more fields than columns"),
        SourceRow(4, "short"),
    ]


def test_a_csv_cut_inside_quotes_raises_with_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'text\nwhole\n"cut in the mid')
    with pytest.raises(InputError, match=r"a.csv: cannot be read to its end"):
        list(read_rows(str(path), source("csv", path)))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_a_number_that_orjson_refuses_does_not_cost_the_row(tmp_path: Path, number: str) -> None:
    row = f'{{"text": "kept", "meta": {{"redpajama_set_name": "RedPajamaBook", "score": [{number}]}}}}'
    path = write(tmp_path / "a.jsonl", lines(row.encode()))
    assert list(read_rows(str(path), source("slimpajama", path))) == [SourceRow(0, "kept", "RedPajamaBook")]


@pytest.mark.parametrize(
    "meta", ['{"redpajama_set_name": "X", "score": NaN}', "{'redpajama_set_name': 'X', 'a': -inf}"]
)
def test_a_subset_is_found_beside_numbers_that_are_none(tmp_path: Path, meta: str) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "kept", "meta": meta}))
    assert list(read_rows(str(path), source("slimpajama", path))) == [SourceRow(0, "kept", "X")]


def test_a_lone_surrogate_becomes_one_replacement_character_and_its_row_is_marked(tmp_path: Path) -> None:
    rows = [
        rb'{"text": "a\ud83db"}',  # the first half
        rb'{"text": "a\uDE00b", "x": NaN}',  # the second
        rb'{"text": "\uD83D\ud83d\ude00\\ud83d"}',  # before a pair; and the text of an escape
        rb'{"text": "good", "\udfff": 1}',
        rb'{"text": "\ud83d\ude00"}',
    ]
    path = write(tmp_path / "a.jsonl", lines(*rows))
    assert list(read_rows(str(path), source("jsonl", path))) == [
        SourceRow(0, "a\ufffdb", repaired=True),
        SourceRow(1, "a\ufffdb", repaired=True),
        SourceRow(2, "\ufffd\U0001f600\\ud83d", repaired=True),
        SourceRow(3, "good", repaired=True),
        SourceRow(4, "\U0001f600"),
    ]


@pytest.mark.parametrize("beginning", ["[\n", '[{"text": "first"},\n', '\ufeff[\n  {"text":', "{\n", " { \r\n"])
def test_json_over_several_lines_is_refused_by_name(tmp_path: Path, beginning: str) -> None:
    path = write(tmp_path / "a.jsonl", beginning.encode() + lines({"text": "row"}, {"text": "row"}) + b"]")
    with pytest.raises(
        InputError, match=r"a.jsonl: .* one JSON object per line is expected; convert it, for example with jq"
    ):
        list(read_rows(str(path), source("jsonl", path)))


@pytest.mark.parametrize("first", [b"[1]", b'{"text": "cut', b"[2026-11-29] a line of a log", b"]"])
def test_a_bad_first_line_costs_no_more_than_itself(tmp_path: Path, first: bytes) -> None:
    path = write(tmp_path / "a.jsonl", lines(first, {"text": "row"}))
    assert [type(row) for row in read_rows(str(path), source("jsonl", path))] == [RejectedRow, SourceRow]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 12345\n"
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
def test_a_pointer_in_place_of_data_is_named_with_how_to_get_it(
    tmp_path: Path, format: str, name: str, pointer: bytes, command: str
) -> None:
    write(tmp_path / name, pointer)
    with pytest.raises(InputError, match=rf"{name}: a git-\w+ pointer, .*run `{command}`"):
        texts_of(source(format, tmp_path))


def test_a_text_about_pointers_is_no_pointer(tmp_path: Path) -> None:
    text = f"A pointer reads:\n{POINTER.decode()}"
    assert texts_of(source("text", write(tmp_path / "a.txt", text.encode()))) == [text]


def test_rejects_name_the_line_that_they_end_on(tmp_path: Path) -> None:
    filler = lines(*({"text": "x" * 1000} for _ in range(1500)))  # over a block's end
    content = b"\n\n" + filler + b"\n" + lines({"body": "no text"}) + b"\r\n" + lines(b"no json")
    path = write(tmp_path / "a.jsonl", content)
    rejects = [row for row in read_rows(str(path), source("jsonl", path)) if isinstance(row, RejectedRow)]
    assert [(row.row, row.line) for row in rejects] == [(1500, 1504), (1501, 1506)]
    path = write(tmp_path / "a.csv", b'text,id\n"two\nlines",1\n,2\na,b,c\n')
    rejects = [row for row in read_rows(str(path), source("csv", path)) if isinstance(row, RejectedRow)]
    assert [(row.row, row.line) for row in rejects] == [(1, 4), (2, 5)]


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b'text\n"a" b\n', r"line 2: .*; put fields in \" and double each \""),
        (b'text\n"a\n', r"unexpected end of data\); close the quote that is open at its end, or fetch"),
        (b"id;text\n1;a\n", r"its columns are separated by ';'; convert it"),
        (b"id\ttext\n1\ta\n", r"its columns are separated by '\\t'; convert it"),
        ("text\na\n".encode("utf-16"), r"are not UTF-8 text; convert it to UTF-8"),
        ("té,text\na,b\n".encode("latin-1"), r"are not UTF-8 text; convert it to UTF-8"),
    ],
)
def test_a_csv_file_that_is_written_otherwise_is_not_to_be_fetched_again(
    tmp_path: Path, content: bytes, remedy: str
) -> None:
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(InputError, match=rf"a.csv: .*{remedy}"):
        list(read_rows(str(path), source("csv", path)))


def test_what_pyarrow_finds_wrong_has_the_remedy_for_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", b"text\n" * 100)
    with pytest.raises(InputError, match=r"a.parquet: .*; fetch it again, correct its suffix and format"):
        texts_of(source("parquet", path))

    def fails(error: Exception) -> InputError:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tinyllama.prepare.readers.parquet_columns", Mock(side_effect=error))
            with pytest.raises(InputError) as raised:
                texts_of(source("parquet", path))
        return raised.value

    assert "without the features that pyarrow lacks" in str(fails(pyarrow.ArrowNotImplementedError("encrypted")))
    with pytest.raises(MemoryError), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyllama.prepare.readers.parquet_columns", Mock(side_effect=pyarrow.ArrowMemoryError("4 GiB")))
        texts_of(source("parquet", path))


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_several_streams_are_one_file_and_nothing_behind_a_stream_is_skipped(tmp_path: Path, suffix: str) -> None:
    pack: Any = {".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    first, second = (pack(lines(*({"text": os.urandom(20).hex()} for _ in range(1000)))) for _ in range(2))
    padding = bytes(1 << 21) if suffix == ".xz" else b""
    path = write(tmp_path / f"a.jsonl{suffix}", first + padding + second + padding)
    assert len(texts_of(source("jsonl", path))) == 2000
    damaged = bytearray(second)
    damaged[5] ^= 1
    for wrong in (first[:-5], first + second[:20], first + damaged, first + b"junk"):
        path = write(tmp_path / f"a.jsonl{suffix}", wrong)
        with pytest.raises(InputError, match=rf"a.jsonl{suffix}: cannot be read to its end .*; fetch it again"):
            texts_of(source("jsonl", path))


def test_packed_bytes_under_a_plain_name_are_refused_in_every_format(tmp_path: Path) -> None:
    for name, packed in (("a.txt", gzip.compress(b"x")), ("a.csv", bz2.compress(b"x")), ("a.txt.bz2", b"BZh is text")):
        path = write(tmp_path / name, packed)
        with pytest.raises(InputError, match=rf"{name}: contains .*, but its name declares .*; rename it"):
            texts_of(source("csv" if name == "a.csv" else "text", path))


SEPARATED = st.lists(st.sampled_from(["a", "b ", "é", "\n", "\r\n", "<|", "|>", "<|x|>", "-", "--", " "]), max_size=40)


@few(300)
@given(parts=SEPARATED, separator=st.sampled_from(["\n", "\n\n", "<|x|>", "--", "\n--\n", "é"]), size=st.integers(1, 9))
def test_a_text_file_is_cut_at_its_separators_wherever_its_blocks_end(
    parts: list[str], separator: str, size: int
) -> None:
    text = "".join(parts)
    if separator.strip("\n"):
        wanted = [part for part in text.split(separator) if part.strip()]
    else:
        wanted = [part.strip("\r\n") for part in re.split(rf"(?:\r?\n){{{len(separator)},}}", text)]
        wanted = [part for part in wanted if part.strip()]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyllama.prepare.streams._CHUNK_BYTES", size)
        path = write(Path(folder) / "a.txt", text.encode())
        found = list(read_rows(str(path), source("text", path, separator=separator)))
    assert found == [SourceRow(number, document) for number, document in enumerate(wanted)]


def test_documents_between_separators_are_rows_or_rejects_and_packed_ones_the_same(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbffirst\n\nsecond\nline\n\n\n\n\xff\r\n\r\nlast\n"
    for name, packed in (("a.txt", content), ("b.txt.zst", zstandard.compress(content))):
        path = write(tmp_path / name, packed)
        chosen = source("text", path, separator=r"\n\n")  # as a shell or YAML's single quotes leave it
        assert list(read_rows(str(path), chosen)) == [
            SourceRow(0, "first"),
            SourceRow(1, "second\nline"),
            RejectedRow(2, "not UTF-8 text"),
            SourceRow(3, "last"),
        ]


@pytest.mark.parametrize("end", [b"", b"<|endoftext|>last"])
def test_a_document_that_no_reader_holds_is_rejected_and_those_after_it_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes
) -> None:
    monkeypatch.setattr("tinyllama.prepare.streams.LONGEST_BYTES", 3 << 20)
    path = write(tmp_path / "a.txt", b"first<|endoftext|>" + b"no separator " * 400_000 + end)
    found = list(read_rows(str(path), source("text", path, separator="<|endoftext|>")))
    assert found == [
        SourceRow(0, "first"),
        RejectedRow(1, "longer than 256 MiB"),
        *([SourceRow(2, "last")] if end else []),
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst"])
def test_a_text_file_that_no_reader_holds_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tinyllama.prepare.streams.LONGEST_BYTES", 3 << 20)
    content = b"one document " * 300_000
    path = write(tmp_path / name, zstandard.compress(content) if name.endswith(".zst") else content)
    assert list(read_rows(str(path), source("text", path))) == [RejectedRow(0, "longer than 256 MiB")]
