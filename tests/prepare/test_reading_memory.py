"""Reading takes bounded memory, however large a document, a row group or a file is."""

import lzma
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from tests.conftest import python_sources

pytestmark = pytest.mark.slow
LONG = 200_000_000


def run_program(*arguments: str, timeout: int = 120) -> list[int]:
    """Return the counts that a program of peak_memory.py prints; the last one is its peak memory in megabytes."""
    command = [sys.executable, str(Path(__file__).with_name("peak_memory.py")), *arguments]
    output = subprocess.run(command, capture_output=True, check=True, timeout=timeout).stdout
    *counts, kilobytes = map(int, output.split())
    return [*counts, kilobytes * 1024 // 1_000_000]


def long_text() -> str:
    return os.urandom(LONG // 2).hex()  # compresses little, so the compressed file is large too


def table_file(path: Path, values: Any, **options: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": values}), path, **options)


def one_dictionary_value(text: str, num_rows: int) -> Any:
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * num_rows, "int32"), pyarrow.array([text]))


def write_long_value(path: Path) -> None:
    table_file(path, ["before" * 100] * 500 + [long_text()] + ["after" * 100] * 500)


def write_compressible_values(path: Path) -> None:
    table_file(path, [letter * 60_000_000 for letter in "aaaabcde"], use_dictionary=True, compression="zstd")


def write_compressible_plain_values(path: Path) -> None:
    table_file(path, [letter * 60_000_000 for letter in "aaaabcde"], use_dictionary=False, compression="zstd")


def write_value_in_dictionary(path: Path) -> None:
    table_file(path, one_dictionary_value(os.urandom(1_000_000).hex(), 1000))


def write_repeated_values(path: Path) -> None:
    text, encoding = os.urandom(5_000_000).hex(), {"content": "DELTA_BYTE_ARRAY"}
    table_file(path, [text] * 100, use_dictionary=False, column_encoding=encoding, compression="zstd")


def one_viewed_value(text: str, num_rows: int) -> Any:
    views = struct.pack("<i4sii", len(text), text[:4].encode(), 0, 0) * num_rows
    buffers = [None, pyarrow.py_buffer(views), pyarrow.py_buffer(text.encode())]
    return pyarrow.Array.from_buffers(pyarrow.string_view(), num_rows, buffers)


def write_arrow_dictionary(path: Path, repeat: Callable[[str, int], Any] = one_dictionary_value) -> None:
    table = pyarrow.table({"text": repeat(os.urandom(10_000_000).hex(), 100)})
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


def write_arrow_view(path: Path) -> None:
    write_arrow_dictionary(path, one_viewed_value)


def write_long_lines(path: Path) -> None:
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as compressed:
        for text in ("before", long_text(), "after"):
            compressed.write(orjson.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaBook"}}) + b"\n")


def write_separated_documents(path: Path) -> None:
    path.write_text(f"before<|x|>{long_text()}<|x|>after")


@pytest.mark.parametrize(
    ("write_file", "name", "arguments", "rows", "characters"),
    [
        (write_long_value, "a.parquet", ["starcoderdata"], 1001, LONG + 550_000),
        (write_compressible_values, "a.parquet", ["starcoderdata"], 8, 480_000_000),
        (write_compressible_plain_values, "a.parquet", ["starcoderdata"], 8, 480_000_000),
        (write_value_in_dictionary, "a.parquet", ["starcoderdata"], 1000, 2_000_000_000),
        (write_repeated_values, "a.parquet", ["starcoderdata"], 100, 1_000_000_000),
        (write_arrow_dictionary, "a.arrow", ["huggingface"], 100, 2_000_000_000),
        (write_arrow_view, "a.arrow", ["huggingface"], 100, 2_000_000_000),
        (write_long_lines, "a.jsonl.zst", ["slimpajama"], 3, LONG + 11),
        (write_separated_documents, "a.txt", ["text", "<|x|>"], 3, LONG + 11),
    ],
)
def test_file_with_long_values_takes_under_a_gigabyte(
    tmp_path: Path, write_file: Callable[[Path], None], name: str, arguments: list[str], rows: int, characters: int
) -> None:
    write_file(tmp_path / name)
    *counts, megabytes = run_program("read", str(tmp_path / name), *arguments)
    assert counts == [rows, characters]
    assert megabytes < 1000


def test_large_row_group_is_read_page_by_page(tmp_path: Path) -> None:
    text = os.urandom(5000).hex()
    values = [f"{number} {text[number % 9000 :]}" * 2 for number in range(40_000)]
    table_file(tmp_path / "a.parquet", values, use_dictionary=False, row_group_size=len(values))
    rows, characters, megabytes = run_program("read", str(tmp_path / "a.parquet"), "starcoderdata")
    assert rows == 40_000
    assert characters > 400_000_000
    assert megabytes < 250


def test_memory_does_not_grow_with_the_size_of_a_file(tmp_path: Path) -> None:
    path, text = tmp_path / "a.jsonl.zst", "some words of prose, " * 50_000
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as compressed:
        for _ in range(1000):
            compressed.write(orjson.dumps({"text": text}) + b"\n")
    *counts, megabytes = run_program("read", str(path), "jsonl")
    assert counts == [1000, 1000 * len(text)]
    assert megabytes < 250


@pytest.mark.parametrize("suffix", ["", pytest.param(".xz", marks=pytest.mark.long)])
def test_text_with_separator_is_read_document_by_document(tmp_path: Path, suffix: str) -> None:
    path, text = tmp_path / f"a.txt{suffix}", b"some words of prose, " * 20_000 + b"\n\n"
    with lzma.open(path, "wb", preset=0) if suffix else path.open("wb") as file:
        for _ in range(1000):
            file.write(text)
    *counts, megabytes = run_program("read", str(path), "text", "\n\n")
    assert counts == [1000, 1000 * (len(text) - 2)]
    assert megabytes < 250


def code() -> str:
    sources = "\n".join(python_sources(60))
    return (sources * (LONG // len(sources) + 1))[:LONG] + "\U0001f600 one character makes a string four times as long"


def one_letter() -> str:
    return "a" * LONG


def dna() -> str:
    return "".join(random.Random(0).choices("ACGT", k=1_000_000)) * (LONG // 1_000_000)


@pytest.mark.parametrize(
    ("format", "long_document"),
    [
        ("slimpajama", code),
        ("parquet", code),
        pytest.param("slimpajama", one_letter, marks=pytest.mark.long),
        pytest.param("slimpajama", dna, marks=pytest.mark.long),
    ],
)
def test_worker_prepares_200_megabytes_in_under_a_gigabyte(
    small: Path, tmp_path: Path, format: str, long_document: Callable[[], str]
) -> None:
    text, raw = long_document(), tmp_path / "raw"
    raw.mkdir()
    if format == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["before", text]}), raw / "a.parquet")
    else:
        row = orjson.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaBook"}})
        (raw / "a.jsonl.zst").write_bytes(zstandard.compress(row))
    books = {"format": format, "path": str(raw), "weight": 1, "max_compression_ratio": 10**6}
    overrides: dict[str, Any] = {"data.store": str(tmp_path / "store"), "data.validation_fraction": 0.01}
    overrides |= {"data.sources": {"books": books}}
    recipe = str(small / "recipe.yaml")
    num_tokens, megabytes = run_program("prepare", recipe, orjson.dumps(overrides).decode(), timeout=300)
    assert num_tokens > LONG // 10
    assert megabytes < 1000
