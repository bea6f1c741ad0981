"""Rows keep their URLs in every format that has them; a file without the column is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from tinyllama.errors import InputError
from tinyllama.prepare.readers import SourceRow, read_rows
from tinyllama.recipe import Source

ROWS = [
    {"text": "one", "url": "https://a.example/1", "meta": {"url": "https://b.example/1"}},
    {"text": "two", "url": "", "meta": {"url": None}},
    {"text": "three", "url": "https://a.example/3", "meta": {"url": "https://b.example/3"}},
]


def urls(path: Path, format: str, **fields: Any) -> list[str | None]:
    source = Source.model_validate(
        {"format": format, "path": str(path), "weight": 1, "clean": {"url_block_lists": ["list.txt"]}, **fields}
    )
    return [row.url for row in read_rows(str(path), source) if isinstance(row, SourceRow)]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    elif kind == "csv":
        lines = [f"{row['url']},{row['text']},x" for row in ROWS]
        path.write_text("\n".join(["url,text,other", *lines]), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        table = pa.Table.from_pylist(ROWS)
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow"])
def test_urls_are_read_from_every_format(tmp_path: Path, kind: str) -> None:
    path, format = write(tmp_path, kind), "huggingface" if kind == "arrow" else kind
    assert urls(path, format) == ["https://a.example/1", None, "https://a.example/3"]
    if kind != "csv":
        assert urls(path, format, url="meta.url") == ["https://b.example/1", None, "https://b.example/3"]
    if kind != "jsonl":
        with pytest.raises(InputError, match=r"no column 'link' with URLs .*set the source's url"):
            urls(path, format, url="link")


def test_urls_are_only_read_if_cleaning_needs_them(tmp_path: Path) -> None:
    assert urls(write(tmp_path, "parquet"), "parquet", clean={}, url="link") == [None] * 3


def test_text_files_have_no_urls(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="format text has no URLs"):
        urls(tmp_path, "text")
