"""A survey finds every file with text, its format and its text field from its content, and counts all other files."""

import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import python_sources
from tests.prepare.raw import COMPRESSIONS, POINTER, lines, write

from tinyllama import cli
from tinyllama.drafting.sources import DraftSource, braces, draft_sources, escape
from tinyllama.drafting.survey import FoundFile, survey, survey_file, text_fields
from tinyllama.errors import InputError
from tinyllama.prepare.files import find_files
from tinyllama.prepare.readers import SourceRow, read_rows
from tinyllama.prepare.sources import list_files

PROSE = "The committee met on Tuesday, and most of its members agreed with the report. "


def drafted(*paths: Path) -> dict[str, DraftSource]:
    """Return the sources for paths by name; each source must read its files, and otherwise only files without text."""
    surveys = survey([str(path) for path in paths], Path("recipe.yaml"))
    sources, _ = draft_sources(surveys)
    harmless = {file.path for one in surveys for file in one.skipped if not file.is_refused}
    for source in sources:
        read = list_files(source.name, source.as_source())
        assert {file.path for file in read} - harmless == {file.path for file in source.files}
        rows = [row for file in read for row in read_rows(file.path, source.as_source())]
        assert any(isinstance(row, SourceRow) for row in rows)
    return {source.name: source for source in sources}


def mixed_folder(folder: Path) -> Path:
    """Write a folder as people have them: notes, code, pictures, rows in several formats."""
    texts = python_sources(30)
    for number, text in enumerate(texts[:12]):
        write(folder / f"src/part{number % 3}/m{number}.py", text.encode())
        write(folder / f"notes/n{number}.md", (PROSE * 40).encode())
    write(folder / "notes/old/more.txt.gz", COMPRESSIONS[".gz"](PROSE.encode() * 900))
    write(folder / "README", PROSE.encode() * 60)
    write(folder / "notes/picture.png", b"\x89PNG\r\n\x1a\n\0\0")
    write(folder / "notes/latin.txt", "Größe".encode("latin-1") * 9)
    write(folder / "notes/empty.md", b"")
    write(folder / "notes/.hidden.md", PROSE.encode())
    rows = [{"id": f"{number:064x}", "title": "A module", "body": text} for number, text in enumerate(texts)]
    write(folder / "crawl/a.jsonl.zst", COMPRESSIONS[".zst"](lines(*rows)))
    write(folder / "crawl/settings.json", b'{\n  "depth": 3\n}\n')
    quoted = "".join(f'{number},"{PROSE * 3}","{PROSE * 30}"\n' for number in range(30))
    write(folder / "forum.csv", f"number,summary,post\n{quoted}".encode())
    table = pa.table({"url": ["https://example.org/page"] * 30, "words": [[1]] * 30, "markdown": [PROSE * 20] * 30})
    (folder / "tables").mkdir()
    pq.write_table(table, folder / "tables/part-0.parquet")
    return folder


def test_mixed_folder_becomes_few_sources(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "mixed")
    sources = drafted(folder)
    found = {name: (one.format, one.field, len(one.files)) for name, one in sources.items()}
    assert found == {
        "mixed": ("text", None, 14),
        "mixed-code": ("text", None, 12),
        "mixed-body": ("jsonl", "body", 1),
        "mixed-post": ("csv", "post", 1),
        "mixed-markdown": ("parquet", "markdown", 1),
    }
    assert sources["mixed"].path == f"{folder}/**/{{*.md,*.txt.gz,README}}"
    assert sources["mixed-code"].path == f"{folder}/**/*.py"
    for source in sources.values():  # estimated without reading the files to their ends
        rows = [row for file in source.files for row in read_rows(file.path, source.as_source())]
        texts = [row.text for row in rows if isinstance(row, SourceRow)]
        assert source.text_bytes == pytest.approx(sum(len(str(text).encode()) for text in texts), rel=0.1)
        assert source.num_documents == pytest.approx(len(texts), rel=0.1)
    (one,) = survey([str(folder)], Path("recipe.yaml"))
    assert {Path(file.path).name: file.reason for file in one.skipped} == {
        "picture.png": "binary, or not UTF-8",
        "latin.txt": "binary, or not UTF-8",
        "empty.md": "empty",
        "settings.json": "JSON without a field of text in each line; lists and objects are not text",
    }


def test_other_fields_with_text_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines(*[{"id": 1, "question": PROSE, "answer": PROSE * 3}] * 9))
    (source,) = drafted(tmp_path).values()
    assert (source.field, source.other_fields) == ("answer", ("question",))


def test_single_files_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert {name: one.path for name, one in drafted(Path("forum.csv")).items()} == {"forum": "forum.csv"}
    named = drafted(Path("notes/n1.md"), Path("notes/n2.md"), Path("crawl/"))
    assert {name: one.path for name, one in named.items()} == {
        "crawl": "crawl/a.jsonl.zst",
        "notes": "notes/{n1.md,n2.md}",
    }
    assert "**/*.py" in {one.path for one in drafted(Path()).values()}


def test_folder_in_a_named_folder_is_read_once(tmp_path: Path) -> None:
    mixed_folder(tmp_path / "mixed")
    assert drafted(tmp_path / "mixed", tmp_path / "mixed/notes").keys() == drafted(tmp_path / "mixed").keys()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_size_of_a_packed_file_is_estimated(tmp_path: Path, suffix: str) -> None:
    text = "\n".join(python_sources(80)).encode("ascii", "ignore")
    assert len(text) > 1_500_000  # more than the beginning that is read
    found = survey_file(str(write(tmp_path / f"a.txt{suffix}", COMPRESSIONS[suffix](text))))
    assert isinstance(found, FoundFile), found
    assert found.text_bytes == pytest.approx(len(text), rel=0.1)


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (POINTER, "a.txt", "git-lfs"),
        (COMPRESSIONS[".gz"](b"text"), "a.md", "gzip"),
        (b"PK\3\4 and more", "a.md", "zip archive"),
        (b"PAR1 and no footer", "a.parquet", "cannot be read"),
        (b"a;b\n1;2\n", "a.csv", "separated by ';'"),
        (lines({"id": "1"}, {"id": "2"}), "a.jsonl", "without a field of text"),
        (b'"' + b"a" * 200_000, "a.csv", "cannot be read"),
        (b'"a\nb"\n' + f'"{PROSE}"\n'.encode() * 9, "a.csv", "no column of text"),
        (lines({"a\tb": PROSE}), "a.jsonl", "without a field of text"),
        (PROSE.encode(), "a\tb.txt", "control characters"),
        (PROSE.encode(), os.fsdecode(b"\xff.txt"), "not UTF-8"),
    ],
    ids=["pointer", "gzip", "zip", "parquet", "semicolons", "numbers", "quote", "column", "field", "tab", "latin-1"],
)
def test_unusable_file_is_skipped_with_its_reason(tmp_path: Path, content: bytes, name: str, reason: str) -> None:
    assert reason in getattr(survey_file(str(write(tmp_path / name, content))), "reason", "")


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"text": [PROSE], "html": [f"<p>{PROSE}</p>"]}, "text"),
        ({"text": ["a title of a page"], "body": [PROSE * 9]}, "body"),
        ({"hash": ["0f" * 500], "image": ["QUJD" * 5000], "prompt": [PROSE]}, "prompt"),
        ({"date": ["2026-11-30 12:00:00"], "path": ["/a/b/c/d/e/f/g.html"]}, None),
        ({"本文": ["これは日本語の文章です。" * 9]}, "本文"),
        ({}, None),
    ],
    ids=["text", "longest", "encoded", "none", "unspaced", "empty"],
)
def test_text_field_is_the_one_with_most_prose(fields: dict[str, list[str]], chosen: str | None) -> None:
    assert next(iter(text_fields(fields)), None) == chosen


@given(st.dictionaries(st.text(max_size=5), st.lists(st.text(max_size=40), max_size=3), max_size=4))
def test_text_fields_are_among_the_fields(fields: dict[str, list[str]]) -> None:
    assert {*text_fields(fields)} <= {*fields}


def test_data_sets_keep_their_splits(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        name: datasets.Dataset.from_dict({"content": [PROSE * 9] * 20}) for name in ("train", "validation", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "raw/saved")
    for split in ("train-0", "validation-0", "test-0"):
        (tmp_path / "raw/hub").mkdir(exist_ok=True)
        pq.write_table(pa.table({"article": [PROSE * 9] * 20}), tmp_path / f"raw/hub/{split}.parquet")
    found = {(one.format, one.field, len(one.files)) for one in drafted(tmp_path / "raw").values()}
    assert found == {("huggingface", "content", 2), ("huggingface", "article", 2)}


@pytest.mark.parametrize(
    ("files", "paths"),
    [
        ({"a/x.txt": "text", "b/y.txt": "bad", "c/z.txt": "text"}, ["{a,c}/**/*.txt"]),
        ({"a/x.txt": "text", "a/y.txt": "bad", "a/z,1.txt": "text"}, ["a/{x.txt,z?1.txt}"]),
        ({"x.txt": "text", "a/y.txt": "bad", "a/z.txt": "text"}, ["x.txt", "a/z.txt"]),
        ({"x.jsonl": "rows", "y.jsonl": "other", "a/z.txt": "text"}, ["x.jsonl", "y.jsonl", "a/z.txt"]),
        ({"a/x.txt": "rows", "a/y.txt": "text", "b/z.md": "text"}, ["a/x.txt", "a/y.txt", "b/z.md"]),
    ],
    ids=["subfolders", "names", "folders", "fields", "rows"],
)
def test_globs_do_not_name_other_files(tmp_path: Path, files: dict[str, str], paths: list[str]) -> None:
    contents = {
        "text": PROSE.encode() * 99,
        "bad": b"PK\3\4 is refused",
        "rows": lines(*[{"body": PROSE}] * 99),
        "other": lines(*[{"content": PROSE}] * 99),
    }
    for name, kind in files.items():
        write(tmp_path / "raw" / name, contents[kind])
    assert {one.path.removeprefix(f"{tmp_path}/raw/") for one in drafted(tmp_path / "raw").values()} == set(paths)


def test_link_between_sources_is_read_once(tmp_path: Path) -> None:
    for name in ("notes/a.md", "notes/b.txt", "src/a.py"):
        write(tmp_path / name, f"{PROSE}\n".encode() * 9)
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/z.txt").symlink_to(tmp_path / "src/a.py")
    (tmp_path / "notes/same.md").symlink_to(tmp_path / "notes/a.md")
    sources = drafted(tmp_path)
    assert sorted(Path(file.path).name for one in sources.values() for file in one.files) == ["a.md", "a.py", "b.txt"]


def test_file_that_no_short_glob_excludes_is_an_error(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / f"{number}/a.txt", PROSE.encode() * 99)
        write(tmp_path / f"{number}/bad.txt", b"PK\3\4 is refused")
    with pytest.raises(InputError, match=r"0/bad.txt: is a zip archive.*no short glob"):
        drafted(tmp_path)


def test_one_bad_file_does_not_hide_others(tmp_path: Path) -> None:
    for number in range(70):
        write(tmp_path / f"{number:02}.jsonl", lines({"body": PROSE * 9}) if number else b"")
    (source,) = drafted(tmp_path).values()
    assert len(source.files) == 69


def test_text_files_are_used_next_to_more_files_that_are_not_utf8(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / f"latin{number}.txt", "Größe".encode("latin-1") * 9)
    write(tmp_path / "a.txt", PROSE.encode() * 99)
    (source,) = drafted(tmp_path).values()
    assert [Path(file.path).name for file in source.files] == ["a.txt"]


def test_data_set_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_dict({"content": [PROSE * 9] * 20}).save_to_disk(".")
    assert [source.format for source in drafted(Path()).values()] == ["huggingface"]


def test_data_set_without_text_is_skipped(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"number": [1] * 20}).save_to_disk(tmp_path / "raw/numbers")
    write(tmp_path / "raw/a.md", PROSE.encode() * 99)
    (source,) = drafted(tmp_path / "raw").values()
    assert source.format == "text"


def test_sources_have_different_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [Path(name) for name in ("docs", "x/docs", "docs-2")]
    for folder in folders:
        write(folder / "a.md", PROSE.encode() * (99 + len(str(folder))))
    Path("link").symlink_to("docs")
    assert len(drafted(*folders, Path("link"))) == 3


@given(st.lists(st.text("ab.*?[]{},! é", min_size=1, max_size=6), min_size=1, max_size=4))
def test_braces_name_files_with_any_characters(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    folder = tmp_path_factory.mktemp("raw")
    expected = {name for name in names if not name.startswith(".")} | {"plain"}
    for name in expected:
        write(folder / name, b"")
    found = find_files(f"{folder}/{braces({'other', *map(escape, expected)})}", bool)
    assert {Path(file.path).name for file in found} == expected


@pytest.mark.parametrize(
    ("arguments", "place", "keyword"),
    [
        (["nowhere"], "nowhere", "no such file"),
        (["pictures"], "pictures", "binary, or not UTF-8: 1 .png"),
        (["tiny.txt"], "tiny.txt", "too little"),
        (["tiny.txt", "--minutes", "0"], "--minutes 0", "out of range"),
        (["tiny.txt", "--output", "there.yaml"], "there.yaml", "--force"),
        (["tiny.txt", "--output", "pictures"], "pictures", "folder"),
        ([], "init", "no folder or file"),
    ],
    ids=["missing", "no text", "tiny", "minutes", "exists", "folder", "none"],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], place: str, keyword: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(Path("pictures/a.png"), b"\x89PNG\0")
    write(Path("tiny.txt"), b"Hello.")
    write(Path("there.yaml"), b"name: mine")
    assert cli.main(["--quiet", "init", *arguments]) == 2
    error = capsys.readouterr().err
    assert place in error
    assert keyword in error
    assert error.count("\n") == 1
    assert Path("there.yaml").read_bytes() == b"name: mine"
