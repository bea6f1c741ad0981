"""Which files of a folder a source reads, and that every other file under its path is counted and named."""

import bz2
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from tests.conftest import python_sources, small_recipe, write_jsonl
from tests.prepare.raw import lines, slim, source, texts_of, write

from tinyllama.cli import main
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.prepare.pipeline import prepare_store
from tinyllama.prepare.sources import list_files, skip_reason
from tinyllama.recipe import Recipe

PACKED = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
CONTENTS = {
    "jsonl": lines({"text": "one\nü"}, {"text": "two"}),
    "text": "one\nü".encode(),
    "csv": 'text\r\n"one\nü"\r\ntwo\r\n'.encode(),
}
ENDINGS = [("jsonl", name) for name in (".jsonl", ".ndjson", ".jsonlines", ".json")] + [
    ("text", ".txt"),
    ("csv", ".csv"),
]


@pytest.mark.parametrize(("format", "ending"), ENDINGS)
@pytest.mark.parametrize("packing", PACKED)
def test_every_common_ending_is_read_in_any_case_however_it_is_packed(
    tmp_path: Path, format: str, ending: str, packing: str
) -> None:
    for number, name in enumerate((ending + packing, (ending + packing).upper(), ending.title() + packing)):
        write(tmp_path / f"{number}{name}", PACKED[packing](CONTENTS[format]))
    texts = ["one\nü"] if format == "text" else ["one\nü", "two"]
    left_out: Counter[str] = Counter()
    assert len(list_files("own", source(format, tmp_path), left_out)) == 3
    assert texts_of(source(format, tmp_path)) == texts * 3
    assert not left_out


def test_slimpajama_and_hub_folders_are_read_in_any_case_and_packing(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"slim/{split}/a.JSONL.XZ", lzma.compress(lines(slim(split))))
        write(tmp_path / f"hub/{split}-0.json.gz", gzip.compress(lines({"text": split})))
    assert texts_of(source("slimpajama", tmp_path / "slim")) == ["train"]
    assert texts_of(source("huggingface", tmp_path / "hub")) == ["train"]


def test_what_is_not_read_is_counted_by_its_ending_and_hidden_files_are_not(tmp_path: Path) -> None:
    unread = ["a.md", "b.MD", "Makefile", "c.jsonl.lz4", "d/e.tar.gz", "d/f.zip", "d/g.2", "h.txt", "i.parquet.gz"]
    for name in [*unread, ".hidden.md", "d/.git/j.md"]:
        write(tmp_path / name, b"?")
    write(tmp_path / "d/k.jsonl", lines({"text": "read"}))
    left_out: Counter[str] = Counter()
    list_files("own", source("jsonl", tmp_path), left_out)
    assert left_out == {
        "ending .md": 2,
        "no ending": 2,
        "ending .jsonl.lz4": 1,
        "ending .tar.gz": 1,
        "ending .zip": 1,
        "ending .txt": 1,
        "ending .parquet.gz": 1,
    }
    left_out.clear()
    list_files("own", source("jsonl", tmp_path / "d/[f-k]*"), left_out)  # of a glob, what it matches
    assert left_out == {"ending .zip": 1, "no ending": 1}


def test_an_ending_that_no_terminal_can_show_is_counted_in_characters_that_it_can() -> None:
    for name in ("a.\x1b[31m", "a.\udcff", "a." + "x" * 1000):
        shown = skip_reason(name)
        assert shown.isprintable()
        assert len(shown.encode()) < 200


def test_json_files_without_an_object_per_line_are_counted_and_the_others_read(tmp_path: Path) -> None:
    rows = [{"text": "in an array"}, {"text": "again"}]
    others = {
        "array.json": json.dumps(rows),
        "array-of-lines.json": "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
        "first-row-behind-the-bracket.json": "[" + ",\n".join(map(json.dumps, rows)) + "]",
        "indented.json": json.dumps(rows[0], indent=2),
        "dataset_info.json": json.dumps({"text": "about the data set"}),
        "no.json": "none at all",
    }
    for name, content in others.items():
        write(tmp_path / "raw" / name, b"\xef\xbb\xbf\n" * (name == "array.json") + content.encode())
    with pytest.raises(
        InputError, match=r"data.sources.own: .*6 ending .json without .*one JSON object per line is ex"
    ):
        list_files("own", source("jsonl", tmp_path / "raw"))
    write(tmp_path / "raw/lines.json", lines({"text": "read", "score": float("nan")}, {"text": "too"}))
    write(tmp_path / "raw/one-row.json", b'{"text": "without a line\'s end"}')
    write(tmp_path / "raw/long.json", lines({"text": "x" * 200_000}))
    write(tmp_path / "raw/none.json", b"")
    for format in ("jsonl", "huggingface"):
        left_out: Counter[str] = Counter()
        files = list_files("own", source(format, tmp_path / "raw"), left_out)
        assert [Path(file.path).name for file in files] == ["lines.json", "long.json", "none.json", "one-row.json"]
        assert left_out == {"ending .json without one JSON object per line": 6}
    # A file that the path names itself is read, and says so.
    with pytest.raises(InputError, match=r"array-of-lines.json: .* one JSON object per line is expected"):
        texts_of(source("jsonl", tmp_path / "raw/array-of-lines.json"))


@pytest.mark.parametrize("other", ["a.jsonl.gz", "a.json", "a.JSONL", "a.ndjson.xz"])
def test_a_copy_under_another_ending_does_not_count_twice(tmp_path: Path, other: str) -> None:
    packing = Path(other).suffix if Path(other).suffix in PACKED else ""
    write(tmp_path / "a.jsonl", CONTENTS["jsonl"])
    write(tmp_path / other, PACKED[packing](CONTENTS["jsonl"]))
    with pytest.raises(InputError, match=r"data.sources.own: .*/a\.\S+ and .*/a\.\S+ begin with the same text"):
        list_files("own", source("jsonl", tmp_path))
    assert texts_of(source("jsonl", tmp_path / "*.jsonl")) == ["one\nü", "two"]
    write(tmp_path / other, PACKED[packing](lines({"text": "of its own"})))  # another text of the same name
    assert sorted(texts_of(source("jsonl", tmp_path))) == ["of its own", "one\nü", "two"]


def test_files_that_were_not_read_stand_in_the_output_the_manifest_and_inspect(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "raw/a.jsonl", python_sources(5))
    for name in ("b.docx", "c.docx", "d.jsonl.br"):
        write(tmp_path / "raw" / name, b"?")
    fields = small_recipe(small)
    fields["data"] |= {"store": str(tmp_path / "store"), "validation_fraction": 0}
    fields["data"]["sources"] = {"own": {"format": "jsonl", "path": str(tmp_path / "raw"), "weight": 1}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(fields))
    wanted = ["own: 2 files not read, ending .docx", "own: 1 file not read, ending .jsonl.br"]
    for command in (["prepare", str(tmp_path / "recipe.yaml")], ["inspect", str(tmp_path / "store")]):
        assert main(command) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line for line in said if "not read" in line] == wanted
    manifest = TokenStore.open(tmp_path / "store").manifest
    assert manifest["sources"]["own"]["files_left_out"] == {"ending .docx": 2, "ending .jsonl.br": 1}
    (tmp_path / "raw/b.docx").unlink()  # which changes nothing that the store is made of
    prepare_store(Recipe.load(tmp_path / "recipe.yaml"))
