"""Reading stays in bounded memory, however large a document, a row group or a file is."""

import lzma
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from tests.conftest import python_sources

# Linux keeps a process's peak; getrusage would tell the peak of the one that started it, if that was higher.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no record of peak memory"),
]
READ = """
import sys
from pathlib import Path
from tinyllama.prepare.readers import SourceRow, read_rows
from tinyllama.recipe import Source
separator = (sys.argv[3:] or [None])[0]
source = Source(format=sys.argv[2], path=sys.argv[1], weight=1, separator=separator, max_compression_ratio=10**6)
rows = characters = 0
for row in read_rows(sys.argv[1], source):
    assert isinstance(row, SourceRow), row
    rows += 1
    characters += len(row.text)
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(rows, characters, peak.split()[1])
"""
PREPARE = """
import json, sys
from pathlib import Path
from tinyllama.prepare.pipeline import prepare_store
from tinyllama.recipe import Recipe
store = prepare_store(Recipe.load(sys.argv[1], json.loads(sys.argv[2])))
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(store["books/train"].num_tokens, peak.split()[1])
"""
LONG = 200_000_000


def read(path: Path, format: str, *separator: str) -> tuple[int, int, int]:
    """Rows, characters, and peak megabytes of a process that reads them."""
    run = [sys.executable, "-c", READ, str(path), format, *separator]
    rows, characters, kilobytes = subprocess.run(run, capture_output=True, check=True, timeout=120).stdout.split()
    return int(rows), int(characters), int(kilobytes) * 1024 // 1_000_000


def long_text() -> str:
    return os.urandom(LONG // 2).hex()  # which compresses little: packed, it is large too


def test_a_document_of_200_megabytes_in_jsonl_takes_under_a_gigabyte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
        for text in ("before", long_text(), "after"):
            packed.write(orjson.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaBook"}}) + b"\n")
    rows, characters, megabytes = read(path, "slimpajama")
    assert (rows, characters) == (3, LONG + 11)
    assert megabytes < 1000


def test_a_document_of_200_megabytes_in_parquet_takes_under_a_gigabyte(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"content": ["before" * 100] * 500 + [long_text()] + ["after" * 100] * 500})
    pyarrow.parquet.write_table(table, path)
    rows, characters, megabytes = read(path, "starcoderdata")
    assert (rows, characters) == (1001, LONG + 550_000)
    assert megabytes < 1000


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_eight_values_of_60_megabytes_that_compress_well_take_under_a_gigabyte(
    tmp_path: Path, use_dictionary: bool
) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"content": [letter * 60_000_000 for letter in "aaaabcde"]})
    pyarrow.parquet.write_table(table, path, use_dictionary=use_dictionary, compression="zstd")
    rows, characters, megabytes = read(path, "starcoderdata")
    assert (rows, characters) == (8, 480_000_000)
    assert megabytes < 1000


def test_a_long_value_that_a_dictionary_holds_once_for_a_thousand_rows_takes_under_a_gigabyte(tmp_path: Path) -> None:
    path, text = tmp_path / "a.parquet", os.urandom(1_000_000).hex()
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, "int32"), [text])
    pyarrow.parquet.write_table(pyarrow.table({"content": values}), path)
    rows, characters, megabytes = read(path, "starcoderdata")
    assert (rows, characters) == (1000, 2_000_000_000)
    assert megabytes < 1000


def test_values_that_repeat_the_one_before_take_under_a_gigabyte(tmp_path: Path) -> None:
    path, text = tmp_path / "a.parquet", os.urandom(5_000_000).hex()
    table = pyarrow.table({"content": [text] * 100})
    encoding = {"content": "DELTA_BYTE_ARRAY"}
    pyarrow.parquet.write_table(table, path, use_dictionary=False, column_encoding=encoding, compression="zstd")
    rows, characters, megabytes = read(path, "starcoderdata")
    assert (rows, characters) == (100, 1_000_000_000)
    assert megabytes < 1000


def test_a_long_value_of_an_arrow_dictionary_takes_under_a_gigabyte(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    text = pyarrow.array([os.urandom(10_000_000).hex()])
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100, "int32"), text)})
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    rows, characters, megabytes = read(path, "huggingface")
    assert (rows, characters) == (100, 2_000_000_000)
    assert megabytes < 1000


def test_a_row_group_is_read_piece_by_piece(tmp_path: Path) -> None:
    path, text = tmp_path / "a.parquet", os.urandom(5000).hex()
    table = pyarrow.table({"content": [f"{number} {text[number % 9000 :]}" * 2 for number in range(40_000)]})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, row_group_size=len(table))
    rows, characters, megabytes = read(path, "starcoderdata")
    assert rows == 40_000
    assert characters > 400_000_000
    assert megabytes < 250


def test_a_file_of_gigabytes_does_not_add_up(tmp_path: Path) -> None:
    path, text = tmp_path / "a.jsonl.zst", "some words of prose, " * 50_000
    row = orjson.dumps({"text": text}) + b"\n"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
        for _ in range(1000):
            packed.write(row)
    rows, characters, megabytes = read(path, "jsonl")
    assert (rows, characters) == (1000, 1000 * len(text))
    assert megabytes < 250


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_a_text_file_with_a_separator_is_read_document_by_document(tmp_path: Path, suffix: str) -> None:
    path, text = tmp_path / f"a.txt{suffix}", b"some words of prose, " * 20_000 + b"\n\n"
    with lzma.open(path, "wb", preset=0) if suffix else path.open("wb") as file:
        for _ in range(1000):
            file.write(text)
    rows, characters, megabytes = read(path, "text", "\n\n")
    assert (rows, characters) == (1000, 1000 * (len(text) - 2))
    assert megabytes < 250


def test_a_document_of_200_megabytes_between_separators_takes_under_a_gigabyte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"before<|x|>{long_text()}<|x|>after")
    rows, characters, megabytes = read(path, "text", "<|x|>")
    assert (rows, characters) == (3, LONG + 11)
    assert megabytes < 1000


@pytest.mark.parametrize("format", ["slimpajama", "parquet"])
def test_a_worker_prepares_a_document_of_200_megabytes_in_under_a_gigabyte(
    small: Path, tmp_path: Path, format: str
) -> None:
    sources = "\n".join(python_sources(60))
    text = (sources * (LONG // len(sources) + 1))[:LONG] + "\U0001f600 one character makes a string four times as long"
    raw = tmp_path / "raw"
    raw.mkdir()
    if format == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["before", text]}), raw / "a.parquet")
    else:
        row = orjson.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaBook"}})
        (raw / "a.jsonl.zst").write_bytes(zstandard.compress(row))
    flags = {"data.store": str(tmp_path / "store"), "data.validation_fraction": 0.01}
    books = {"format": format, "path": str(raw), "weight": 1, "max_compression_ratio": 10**6}
    flags |= {"data.sources": {"books": books}}
    run = [sys.executable, "-c", PREPARE, str(small / "recipe.yaml"), orjson.dumps(flags).decode()]
    said = subprocess.run(run, capture_output=True, check=True, timeout=300).stdout
    num_tokens, kilobytes = map(int, said.split())
    assert num_tokens > LONG // 10
    assert kilobytes * 1024 < 1_000_000_000
