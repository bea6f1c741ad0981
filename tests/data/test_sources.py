"""Raw files become documents, rejects or a named error: never silence."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tinyllama.data.sources import Reject, Row, list_files, read_rows
from tinyllama.errors import InputError
from tinyllama.recipe_data import Source


def source(format: str, path: Path, **more: Any) -> Source:
    return Source.model_validate({"format": format, "path": str(path), "weight": 1.0, **more})


def lines(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def slim(text: object, subset: str = "RedPajamaC4") -> dict[str, object]:
    return {"text": text, "meta": {"redpajama_set_name": subset}}


def test_every_bad_row_is_a_reject_with_its_place_and_reason(tmp_path: Path) -> None:
    content = lines({"text": "good"}, b'{"text": "cut', {"body": "x"}, {"text": None}, {"text": 3}, {"text": ""}, [1])
    content += b'{"text": "\xff"}\n\n' + lines({"text": "last"})
    path = write(tmp_path / "a.jsonl", content)
    assert list(read_rows(path, source("jsonl", path))) == [
        Row(0, "good"),
        Reject(1, "invalid JSON"),
        Reject(2, "no text"),
        Reject(3, "no text"),
        Reject(4, "text is not text"),
        Reject(5, "empty text"),
        Reject(6, "not a JSON object"),
        Reject(7, "invalid JSON"),
        Row(8, "last"),
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_of_any_length_read_the_same_from_any_compression(tmp_path: Path, suffix: str) -> None:
    texts = ["a" * 3_000_000, "b", "c\nd" * 700_000]
    content = lines(*({"text": text} for text in texts)).removesuffix(b"\n")
    packed = {"": content, ".gz": gzip.compress(content), ".zst": zstandard.compress(content)}[suffix]
    path = write(tmp_path / f"a.jsonl{suffix}", packed)
    assert [row.text for row in read_rows(path, source("jsonl", path)) if isinstance(row, Row)] == texts


def test_zstd_frames_one_after_the_other_are_one_file(tmp_path: Path) -> None:
    frames = [zstandard.compress(lines({"text": word})) for word in ("one", "two", "three")]
    path = write(tmp_path / "a.jsonl.zst", b"".join(frames))
    assert [row.text for row in read_rows(path, source("jsonl", path)) if isinstance(row, Row)] == [
        "one",
        "two",
        "three",
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_cut_in_the_middle_raises_with_its_name(tmp_path: Path, suffix: str) -> None:
    content = lines(*({"text": os.urandom(50).hex()} for _ in range(2000)))
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    path = write(tmp_path / f"a.jsonl{suffix}", packed[: len(packed) // 2])
    with pytest.raises(InputError, match=rf"a.jsonl{suffix}: cannot be read to its end.*fetch it again"):
        list(read_rows(path, source("jsonl", path)))


def test_slimpajama_leaves_out_its_test_split_and_the_excluded_subset(tmp_path: Path) -> None:
    rows = lines(slim("prose"), slim("code", "RedPajamaGithub"), {"text": "no meta"})
    for place in ("train/chunk1/a", "train/chunk2/b", "validation/chunk1/c", "test/chunk1/d"):
        write(tmp_path / f"{place}.jsonl.zst", zstandard.compress(rows))
    recipe = source("slimpajama", tmp_path, exclude=["RedPajamaGithub"])
    files = list_files("slim", recipe)
    assert [(file.path.name[0], file.split) for file in files] == [("a", "train"), ("b", "train"), ("c", "validation")]
    assert list(read_rows(files[0].path, recipe)) == [
        Row(0, "prose"),
        Reject(1, "excluded: RedPajamaGithub", counted_only=True),
        Reject(2, "no meta.redpajama_set_name"),
    ]


def test_starcoderdata_reads_the_languages_that_the_recipe_names(tmp_path: Path) -> None:
    for language in ("c", "go", "python"):
        (tmp_path / language).mkdir()
        table = pyarrow.table({"content": [f"{language} 1", None, f"{language} 2"], "id": [1, 2, 3]})
        pyarrow.parquet.write_table(table, tmp_path / language / "train-00000-of-00001.parquet")
    all_but_go = source("starcoderdata", tmp_path, exclude=["go"])
    assert [file.path.parent.name for file in list_files("star", all_but_go)] == ["c", "python"]
    only_go = source("starcoderdata", tmp_path, include=["go"])
    files = list_files("star", only_go)
    assert [file.path.parent.name for file in files] == ["go"]
    assert list(read_rows(files[0].path, only_go)) == [Row(0, "go 1"), Reject(1, "no content"), Row(2, "go 2")]


def test_a_table_without_the_column_is_named_with_what_it_has(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: no column 'text' \(it has body\)"):
        list(read_rows(tmp_path / "a.parquet", source("parquet", tmp_path)))
    path = write(tmp_path / "a.csv", b"body\nx\n")
    with pytest.raises(InputError, match=r"a.csv: no column 'text' \(it has body\)"):
        list(read_rows(path, source("csv", path)))
    broken = write(tmp_path / "b.parquet", b"PAR1 not really")
    with pytest.raises(InputError, match=r"b.parquet: cannot be read to its end"):
        list(read_rows(broken, source("parquet", broken)))


def test_text_and_csv_are_read_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a page\nof text ü".encode())
    assert list(read_rows(path, source("text", path))) == [Row(0, "a page\nof text ü")]
    path = write(tmp_path / "b.txt", b"\xff\xfe")
    assert list(read_rows(path, source("text", path))) == [Reject(0, "not UTF-8 text")]
    path = write(tmp_path / "a.csv", b'id,body\n1,"two\nlines"\n2,\n')
    assert list(read_rows(path, source("csv", path, text="body"))) == [Row(0, "two\nlines"), Reject(1, "empty body")]


def test_a_csv_cut_inside_quotes_raises_with_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'text\nwhole\n"cut in the mid')
    with pytest.raises(InputError, match=r"a.csv: cannot be read to its end"):
        list(read_rows(path, source("csv", path)))


def test_folders_and_globs_list_in_sorted_order_and_nothing_is_an_error(tmp_path: Path) -> None:
    for name in ("b", "a", "c/d"):
        write(tmp_path / f"{name}.jsonl", lines({"text": name}))
    everything = list_files("notes", source("jsonl", tmp_path))
    assert [str(file.path.relative_to(tmp_path)) for file in everything] == ["a.jsonl", "b.jsonl", "c/d.jsonl"]
    assert len(list_files("notes", source("jsonl", tmp_path / "*.jsonl"))) == 2
    with pytest.raises(InputError, match=r"data.sources.notes: no .jsonl"):
        list_files("notes", source("jsonl", tmp_path / "nowhere"))
