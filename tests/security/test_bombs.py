"""Small files that decompress to large ones are refused, and readers have memory bounds."""

import bz2
import contextlib
import gzip
import lzma
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from tests.prepare.raw import source

from tinyllama.errors import InputError
from tinyllama.prepare.files import local_copy
from tinyllama.prepare.readers import RejectedRow, SourceRow, read_rows

PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}
SIZE = 80_000_000
CONTENTS = {
    "jsonl": b'{"text": "' + b"a" * SIZE + b'"}\n',
    "text": b"a" * SIZE,
    "csv": b"text\n" + 2 * (b"a" * (SIZE // 2) + b"\n"),
}


def read(path: Path, format: str, **settings: object) -> list[SourceRow | RejectedRow]:
    return list(read_rows(str(path), source(format, path, **settings)))


@pytest.mark.parametrize("packing", ["gz", "zst", "xz", "bz2"])
@pytest.mark.parametrize("format", ["jsonl", "text", "csv"])
def test_decompression_bomb_is_refused(tmp_path: Path, packing: str, format: str) -> None:
    path = tmp_path / f"bomb.{format.replace('text', 'txt')}.{packing}"
    path.write_bytes(PACKINGS[packing](CONTENTS[format]))
    ratio = SIZE // path.stat().st_size // 2
    with pytest.raises(InputError, match=f"{path.name}: decompresses to more than {ratio:,} times its size"):
        read(path, format, max_compression_ratio=ratio)
    rows = read(path, format, max_compression_ratio=4 * ratio)
    assert sum(len(row.text) for row in rows if isinstance(row, SourceRow)) == SIZE


def test_ratio_also_limits_small_files(tmp_path: Path) -> None:
    path, row = tmp_path / "a.jsonl.zst", b'{"text":"ab cd"}\n'
    path.write_bytes(zstandard.compress(row * 60_000))
    assert len(read(path, "jsonl")) == 60_000  # 1 MiB is always allowed
    path.write_bytes(zstandard.compress(row * 3_000_000))
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="decompresses to more than 1,000 times its size"):
        read(path, "jsonl")


def test_only_compressed_empty_lines_are_refused(tmp_path: Path) -> None:
    flood = b"\n" * SIZE
    packed, plain = tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl"
    packed.write_bytes(zstandard.compress(flood))
    plain.write_bytes(flood + b"{\n")
    with pytest.raises(InputError, match="decompresses to more than 1,000 times"):
        read(packed, "jsonl")
    assert read(plain, "jsonl") == [RejectedRow(0, "invalid JSON", line=SIZE + 1)]


def test_repeated_dictionary_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, "int32"), ["a" * 1_000_000])
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, compression="zstd")
    with pytest.raises(InputError, match=r"a\.parquet: decompresses to more than 1,000 times its size"):
        read(path, "parquet")


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv", "text"])
def test_oversized_value_is_rejected_with_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    for module in ("streams", "columnar"):
        monkeypatch.setattr(f"tinyllama.prepare.{module}.LONGEST_BYTES", 1 << 20)
    monkeypatch.setattr("tinyllama.prepare.readers._CSV_CHARACTERS", 1 << 20)
    path, text = tmp_path / "a", "b" * (2 << 20)
    match format:
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": ["one", text, "two"]}), path)
        case "jsonl":
            path.write_text(f'{{"text": "one"}}\n{{"text": "{text}"}}\n{{"text": "two"}}\n')
        case "csv":
            path.write_text(f"text\none\n{text}\ntwo\n")
        case "text":
            path.write_text(text)
    if format == "csv":
        with pytest.raises(InputError, match="a record has more than"):
            read(path, format)
        return
    rows = read(path, format)
    assert [row.reason for row in rows if isinstance(row, RejectedRow)] == ["longer than 256 MiB"]
    assert [row.text for row in rows if isinstance(row, SourceRow)] == ([] if format == "text" else ["one", "two"])


@pytest.mark.parametrize("lines", ["text\n{fields}\ngood\n", "text,{fields}z\ngood\n"])
def test_csv_record_of_many_fields_is_refused(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(lines.format(fields="ab," * 5_000_000))
    with pytest.raises(InputError, match=r"a record has more than .* commas; correct it, or convert"):
        read(path, "csv")


@pytest.mark.parametrize("kind", ["string", "string_view", "dictionary"])
@pytest.mark.parametrize("new_writer", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_oversized_record_batch_is_refused_before_decompression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_writer: Callable[..., Any], kind: str
) -> None:
    path, texts = tmp_path / "a.arrow", ["one " * 100_000, "two " * 100_000]
    column = pyarrow.array(texts).dictionary_encode() if kind == "dictionary" else pyarrow.array(texts, kind)
    table = pyarrow.table({"text": column})
    for compression in (None, "zstd", "lz4"):
        with new_writer(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=compression)) as file:
            file.write_table(table)
        with monkeypatch.context() as limit:
            assert [row.text for row in read(path, "huggingface") if isinstance(row, SourceRow)] == texts
            limit.setattr("tinyllama.prepare.columnar._MAX_PAGE_BYTES", 1 << 19)
            if compression:
                with pytest.raises(
                    InputError, match=r"a\.arrow: a record batch decompresses to 800,\d+ bytes, more th"
                ):
                    read(path, "huggingface")
            else:
                assert len(read(path, "huggingface")) == 2


def test_size_check_covers_every_form_of_arrow_compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, text = tmp_path / "a.arrow", pyarrow.array(["one " * 100_000], "string_view")
    table = pyarrow.table({"text": text} | {str(number): ["x"] for number in range(1000)})
    with pyarrow.ipc.new_stream(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(table)
    data = path.read_bytes()
    vtable = b"\x0e\0 \0"  # sizes of the vtable (14) and of the record batch
    assert data.count(vtable) == 1
    path.write_bytes(data.replace(vtable, b"\0\x80 \0"))
    assert len(read(path, "huggingface")) == 1
    monkeypatch.setattr("tinyllama.prepare.columnar._MAX_PAGE_BYTES", 1 << 18)
    with pytest.raises(InputError, match="a record batch decompresses to 4"):
        read(path, "huggingface")
    options = pyarrow.ipc.IpcWriteOptions(metadata_version=pyarrow.ipc.MetadataVersion.V4)
    with pyarrow.ipc.new_stream(path, pyarrow.schema({"text": pyarrow.string()}), options=options) as file:
        file.write_batch(pyarrow.record_batch({"text": ["one"]}), {"ARROW:experimental_compression": "zstd"})
    with pytest.raises(InputError, match="arrow before"):
        read(path, "huggingface")


@pytest.mark.parametrize(("emit_deltas", "is_refused"), [(False, False), (True, True)])
def test_replaced_dictionary_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emit_deltas: bool, is_refused: bool
) -> None:
    monkeypatch.setattr("tinyllama.prepare.columnar._MAX_PAGE_BYTES", 1_000_000)
    path, texts = tmp_path / "a.arrow", [letter * 300_000 for letter in "abcd"]
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd", emit_dictionary_deltas=emit_deltas)
    schema = pyarrow.schema({"text": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())})
    with pyarrow.ipc.new_stream(path, schema, options=options) as file:
        for number in range(4):
            values = texts[: number + 1] if emit_deltas else [texts[number]]
            column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([len(values) - 1], "int32"), values)
            file.write_batch(pyarrow.record_batch([column], schema=schema))
    if is_refused:
        with pytest.raises(InputError, match="a record batch decompresses to 1,2"):
            read(path, "huggingface")
    else:
        assert [row.text for row in read(path, "huggingface") if isinstance(row, SourceRow)] == texts


@pytest.mark.parametrize("packing", ["zst", "xz"])
def test_remedy_for_large_window_is_recompression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    path, row = tmp_path / f"a.jsonl.{packing}", b'{"text":"hello"}\n'
    if packing == "xz":  # a larger dictionary would need gigabytes here
        monkeypatch.setattr("tinyllama.prepare.streams._XZ_BYTES", 1 << 20)
        path.write_bytes(lzma.compress(row))
    else:
        options = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
        writer = zstandard.ZstdCompressor(compression_params=options).compressobj()
        path.write_bytes(writer.compress(row) + writer.flush())
    with pytest.raises(InputError, match=r"[Mm]emory.*; recompress it with a window of at most 128 MiB"):
        read(path, "jsonl")


@pytest.mark.long
def test_too_many_rejected_rows_end_prepare(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x\n" * 1_100_000)
    with pytest.raises(InputError, match=r"a\.jsonl: 1,000,001 rows are rejected \(the last one: invalid JSON\)"):
        read(tmp_path / "a.jsonl", "jsonl")
    table = pyarrow.table({"text": pyarrow.nulls(50_000_000, "string")})
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    with pytest.raises(InputError, match=r"a\.arrow: (decompresses to more than|1,000,001 rows)"):
        read(tmp_path / "a.arrow", "huggingface")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_list_column_is_refused_before_reading(tmp_path: Path, kind: str) -> None:
    table = pyarrow.table({"text": [[1] * 1000]})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    with pytest.raises(InputError, match="column text contains lists"):
        read(path, "huggingface")


def test_page_with_unreadable_header_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet")
    data = bytearray(path.read_bytes())
    place = pyarrow.parquet.read_metadata(path).row_group(0).column(0).data_page_offset
    data[place] = 0x19  # a list, where the page's type belongs
    path.write_bytes(data)
    with pytest.raises(InputError, match="page header of text is damaged"):
        read(path, "parquet")


def test_endless_download_is_stopped() -> None:
    class Endless(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x" * 65536)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/x.jsonl"
            with pytest.raises(InputError, match="the server does not report"), local_copy(address):
                pass
        finally:
            server.shutdown()


def parquet(path: Path) -> Path:
    texts = ["one " * 100_000, "two " * 100_000]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False)
    return path


def test_oversized_page_is_refused_before_decompression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "a.parquet")
    assert len(read(path, "parquet")) == 2
    monkeypatch.setattr("tinyllama.prepare.columnar._MAX_PAGE_BYTES", 1 << 19)
    with pytest.raises(InputError, match=r"a\.parquet: a page of text has 800,014 bytes, more than 524,288"):
        read(path, "parquet")


def test_page_size_is_read_from_page_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllama.prepare.columnar._MAX_PAGE_BYTES", 900_000)
    path = parquet(tmp_path / "a.parquet")
    data = bytearray(path.read_bytes())
    place = pyarrow.parquet.read_metadata(path).row_group(0).column(0).data_page_offset
    assert data[place : place + 3] == b"\x15\x00\x15"  # the page's type, then its unpacked size as a varint of 3 bytes
    data[place + 3 : place + 6] = b"\xfe\xff\x7f"
    path.write_bytes(data)
    with pytest.raises(InputError, match="a page of text has 1,048,575 bytes, more than 900,000"):
        read(path, "parquet")
