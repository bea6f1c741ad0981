"""A source has every file of its kinds exactly once, in the right split; other files are counted by reason."""

import json
import lzma
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from pydantic import ValidationError
from tests.conftest import python_sources, small_recipe, write_jsonl
from tests.prepare.raw import COMPRESSIONS, lines, slim, source, texts_of, write

from tinyllama.cli import main
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.prepare.pipeline import build_store
from tinyllama.prepare.readers import RejectedRow, SourceRow, read_rows
from tinyllama.prepare.sources import OUTPUT, InputFile, check_sources_disjoint, list_files, skip_reason
from tinyllama.recipe import SLIMPAJAMA_SUBSETS, Recipe, Source

CONTENTS = {
    "jsonl": lines({"text": "one\nü"}, {"text": "two"}),
    "text": "one\nü".encode(),
    "csv": 'text\r\n"one\nü"\r\ntwo\r\n'.encode(),
}
SUFFIXES = [
    *(("jsonl", suffix) for suffix in (".jsonl", ".ndjson", ".jsonlines", ".json")),
    ("text", ".txt"),
    ("csv", ".csv"),
]


def table(path: Path, **columns: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def listed(format: str, path: Path | str, **more: object) -> list[str]:
    """Return the splits and names of a source's files."""
    return [f"{file.split} {Path(file.path).name}" for file in list_files("own", source(format, path, **more))]


# Suffixes


@pytest.mark.parametrize(("format", "suffix"), SUFFIXES)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_suffixes_are_read_in_any_case_and_compression(
    tmp_path: Path, format: str, suffix: str, compression: str
) -> None:
    for number, name in enumerate((suffix + compression, (suffix + compression).upper(), suffix.title() + compression)):
        write(tmp_path / f"{number}{name}", COMPRESSIONS[compression](CONTENTS[format]))
    texts = ["one\nü"] if format == "text" else ["one\nü", "two"]
    skipped: Counter[str] = Counter()
    assert len(list_files("own", source(format, tmp_path), skipped)) == 3
    assert texts_of(source(format, tmp_path)) == texts * 3
    assert not skipped


def test_skipped_files_are_counted_by_suffix(tmp_path: Path) -> None:
    names = ["a.md", "b.MD", "Makefile", "c.jsonl.lz4", "d/e.tar.gz", "d/f.zip", "d/g.2", "h.txt", "i.parquet.gz"]
    for name in [*names, ".hidden.md", "d/.git/j.md"]:  # hidden files are not counted
        write(tmp_path / name, b"?")
    write(tmp_path / "d/k.jsonl", lines({"text": "read"}))
    skipped: Counter[str] = Counter()
    list_files("own", source("jsonl", tmp_path), skipped)
    assert skipped == {
        "ending .md": 2,
        "no ending": 2,
        "ending .jsonl.lz4": 1,
        "ending .tar.gz": 1,
        "ending .zip": 1,
        "ending .txt": 1,
        "ending .parquet.gz": 1,
    }
    skipped.clear()
    list_files("own", source("jsonl", tmp_path / "d/[f-k]*"), skipped)
    assert skipped == {"ending .zip": 1, "no ending": 1}


@pytest.mark.parametrize("name", ["a.\x1b[31m", "a.\udcff", "a." + "x" * 1000])
def test_skip_reason_is_short_and_printable(name: str) -> None:
    assert skip_reason(name).isprintable()
    assert len(skip_reason(name).encode()) < 200


def test_json_files_without_json_lines_are_skipped(tmp_path: Path) -> None:
    rows = [{"text": "in an array"}, {"text": "again"}]
    others = {
        "array.json": json.dumps(rows),
        "array-of-lines.json": "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
        "first-row-after-the-bracket.json": "[" + ",\n".join(map(json.dumps, rows)) + "]",
        "indented.json": json.dumps(rows[0], indent=2),
        "dataset_info.json": json.dumps({"text": "about the data set"}),
        "no.json": "not JSON",
    }
    for name, content in others.items():
        write(tmp_path / "raw" / name, b"\xef\xbb\xbf\n" * (name == "array.json") + content.encode())
    with pytest.raises(InputError, match=r"data.sources.own: .*6 ending .json without .*one JSON object per line"):
        list_files("own", source("jsonl", tmp_path / "raw"))
    write(tmp_path / "raw/lines.json", lines({"text": "read", "score": float("nan")}, {"text": "too"}))
    write(tmp_path / "raw/one-row.json", b'{"text": "without a line end"}')
    write(tmp_path / "raw/long.json", lines({"text": "x" * 200_000}))
    write(tmp_path / "raw/none.json", b"")
    for format in ("jsonl", "huggingface"):
        skipped: Counter[str] = Counter()
        files = list_files("own", source(format, tmp_path / "raw"), skipped)
        assert [Path(file.path).name for file in files] == ["lines.json", "long.json", "none.json", "one-row.json"]
        assert skipped == {"ending .json without one JSON object per line": 6}
    # A file that the path names is read, and reports the error.
    with pytest.raises(InputError, match=r"array-of-lines.json: .* one JSON object per line is expected"):
        texts_of(source("jsonl", tmp_path / "raw/array-of-lines.json"))


@pytest.mark.parametrize("other", ["a.jsonl.gz", "a.json", "a.JSONL", "a.ndjson.xz"])
def test_copy_under_another_suffix_is_an_error(tmp_path: Path, other: str) -> None:
    compress = COMPRESSIONS.get(Path(other).suffix, bytes)
    write(tmp_path / "a.jsonl", CONTENTS["jsonl"])
    write(tmp_path / other, compress(CONTENTS["jsonl"]))
    with pytest.raises(InputError, match=r"data.sources.own: .*/a\.\S+ and .*/a\.\S+ begin with the same text"):
        list_files("own", source("jsonl", tmp_path))
    assert texts_of(source("jsonl", tmp_path / "*.jsonl")) == ["one\nü", "two"]
    write(tmp_path / other, compress(lines({"text": "a different text"})))
    assert sorted(texts_of(source("jsonl", tmp_path))) == ["a different text", "one\nü", "two"]


def test_skipped_files_are_in_output_manifest_and_inspect(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "raw/a.jsonl", python_sources(5))
    for name in ("b.docx", "c.docx", "d.jsonl.br"):
        write(tmp_path / "raw" / name, b"?")
    fields = small_recipe(small)
    fields["data"] |= {"store": str(tmp_path / "store"), "validation_fraction": 0}
    fields["data"]["sources"] = {"own": {"format": "jsonl", "path": str(tmp_path / "raw"), "weight": 1}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(fields))
    for command in (["prepare", str(tmp_path / "recipe.yaml")], ["inspect", str(tmp_path / "store")]):
        assert main(command) == 0
        output = capsys.readouterr().out
        assert "2 files not read, ending .docx" in output
        assert "1 file not read, ending .jsonl.br" in output
    manifest = TokenStore.open(tmp_path / "store").manifest
    assert manifest["sources"]["own"]["skipped_files"] == {"ending .docx": 2, "ending .jsonl.br": 1}
    (tmp_path / "raw/b.docx").unlink()  # not an input of the store
    build_store(Recipe.load(tmp_path / "recipe.yaml"))


# SlimPajama and Starcoderdata


def test_slimpajama_skips_its_test_split_and_excluded_subset(tmp_path: Path) -> None:
    rows = lines(slim("prose"), slim("code", "RedPajamaGithub"), {"text": "no meta"})
    for place in ("train/chunk1/a", "train/chunk2/b", "validation/chunk1/c", "test/chunk1/d"):
        write(tmp_path / f"{place}.jsonl.zst", zstandard.compress(rows))
    write(tmp_path / "train/chunk3/e.JSONL.XZ", lzma.compress(rows))
    recipe = source("slimpajama", tmp_path, exclude=["RedPajamaGithub"])
    names = ["train a.jsonl.zst", "train b.jsonl.zst", "train e.JSONL.XZ", "validation c.jsonl.zst"]
    assert listed("slimpajama", tmp_path) == names
    assert list(read_rows(list_files("slim", recipe)[0].path, recipe)) == [
        SourceRow(0, "prose", "RedPajamaC4"),
        RejectedRow(1, "excluded: RedPajamaGithub", is_intentional=True),
        RejectedRow(2, "no meta.redpajama_set_name"),
    ]
    # A glob may match the split's folder by a wildcard.
    assert listed("slimpajama", tmp_path / "*/chunk1/*.zst") == ["train a.jsonl.zst", "validation c.jsonl.zst"]


def test_slimpajama_parquet_copies_keep_their_splits(tmp_path: Path) -> None:
    names = [f"{split}-0000{number}-of-00002.parquet" for split in ("train", "validation", "test") for number in (0, 1)]
    for name in names:
        table(tmp_path / "data" / name, text=["x"], meta=[{"redpajama_set_name": "RedPajamaC4"}])
    assert listed("slimpajama", tmp_path) == [f"{name.split('-')[0]} {name}" for name in names[:4]]


@pytest.mark.parametrize("choice", ["include", "exclude"])
def test_unknown_subset_is_an_error_with_the_nearest(choice: str) -> None:
    with pytest.raises(ValidationError, match=r"RedPajamaGitHub is not a subset .*did you mean RedPajamaGith"):
        source("slimpajama", "raw", **{choice: ["RedPajamaGitHub"]})
    with pytest.raises(ValidationError, match=r"format jsonl has no subsets"):
        source("jsonl", "raw", **{choice: ["RedPajamaGithub"]})


def test_subset_both_included_and_excluded_is_an_error() -> None:
    with pytest.raises(ValidationError, match=r"python is included and excluded"):
        source("starcoderdata", "raw", include=["python"], exclude=["python", "c"])


def test_starcoderdata_reads_the_chosen_languages(tmp_path: Path) -> None:
    for language in ("c", "go", "python"):
        texts = [f"{language} 1", None, f"{language} 2"]
        table(tmp_path / language / "train-00000-of-00001.parquet", content=texts, id=[1, 2, 3])
    assert len(list_files("star", source("starcoderdata", tmp_path))) == 3
    all_but_go = list_files("star", source("starcoderdata", tmp_path, exclude=["go"]))
    assert [Path(file.path).parent.name for file in all_but_go] == ["c", "python"]
    only_go = source("starcoderdata", tmp_path, include=["go"])
    (file,) = list_files("star", only_go)
    assert list(read_rows(file.path, only_go)) == [
        SourceRow(0, "go 1", "go"),
        RejectedRow(1, "no content"),
        SourceRow(2, "go 2", "go"),
    ]


@pytest.mark.parametrize("choice", ["include", "exclude"])
def test_unknown_language_is_an_error_with_the_nearest(tmp_path: Path, choice: str) -> None:
    for language in ("javascript", "python"):
        table(tmp_path / language / "train-00000-of-00001.parquet", content=["x"])
    with pytest.raises(InputError, match=rf"data.sources.star.{choice}: 'pyton' .* did you mean python\?"):
        list_files("star", source("starcoderdata", tmp_path, **{choice: ["pyton"]}))


def test_starcoderdata_folder_with_other_columns_is_an_error_before_any_work(tmp_path: Path) -> None:
    commits = table(tmp_path / "git-commits-cleaned/train-0.parquet", message=["fix"], diff=["+x"])
    table(tmp_path / "jupyter-scripts-dedup-filtered/train-0.parquet", content=["a notebook"], id=[1])
    table(tmp_path / "python/train-0.parquet", content=["x = 1"], id=[1])
    with pytest.raises(InputError, match=r"no column 'content' in git-commits-cleaned \(it has message, diff\)"):
        list_files("star", source("starcoderdata", tmp_path))
    rest = source("starcoderdata", tmp_path, exclude=["git-commits-cleaned"])
    assert texts_of(rest) == ["a notebook", "x = 1"]
    own = source("starcoderdata", tmp_path, include=["git-commits-cleaned"], text="diff")
    assert list(read_rows(str(commits), own)) == [SourceRow(0, "+x", "git-commits-cleaned")]
    check_sources_disjoint({"a": rest, "b": own}, {"a": list_files("a", rest), "b": list_files("b", own)})
    write(tmp_path / "rust/train-0.parquet", b"PAR1 no more")
    with pytest.raises(InputError, match=r"rust/train-0.parquet: cannot be read"):
        list_files("star", rest)


# Folders of data sets


def test_hub_folder_has_the_splits_of_the_hub(tmp_path: Path) -> None:
    places = {
        "plain.jsonl": "train",
        "data/train-00000-of-00001.jsonl": "train",
        "data/validation-00000-of-00001.jsonl": "validation",
        "data/test-00000-of-00001.jsonl": None,
        "dev/test_of_patience.jsonl": "validation",  # the word of a folder counts before that of a file
        "my-valid.jsonl": "validation",
        "evaluation/0.jsonl": None,
        "contest/latest.jsonl": "train",  # parts of words do not count
        "Test/0.jsonl": None,
    }
    for place in places:
        write(tmp_path / place, lines({"text": place}))
    for other in ("README.md", "dataset_infos.json", ".cache/huggingface/download/data/train-00000-of-00001.jsonl"):
        write(tmp_path / other, b"{}")
    files = list_files("hub", source("huggingface", tmp_path))
    found = {str(Path(file.path).relative_to(tmp_path)): file.split for file in files}
    assert found == {place: split for place, split in places.items() if split}


def test_hub_folder_with_two_kinds_of_files_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines({"text": "once"}))
    write(tmp_path / "more.jsonl.gz", b"")
    write(tmp_path / "train.csv", b"text\nonce\n")
    with pytest.raises(InputError, match=r"contains csv and jsonl files"):
        list_files("hub", source("huggingface", tmp_path))
    assert texts_of(source("huggingface", tmp_path / "**/*.csv")) == ["once"]
    write(tmp_path / "other/a.json", lines({"text": "twice"}))
    write(tmp_path / "other/b.jsonl", lines({"text": "once"}))
    with pytest.raises(InputError, match=r"contains json and jsonl files, .*a glob that ends in \*.jsonl\*"):
        list_files("hub", source("huggingface", tmp_path / "other"))
    assert texts_of(source("huggingface", tmp_path / "other/*.jsonl*")) == ["once"]


def test_folder_saved_by_datasets_is_read_split_by_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = {split: [f"{split} {number}" for number in range(2500)] for split in ("train", "validation", "test")}
    parts = {split: datasets.Dataset.from_dict({"id": range(2500), "text": own}) for split, own in texts.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved", num_shards={"train": 3, "validation": 1, "test": 1})
    write(tmp_path / "saved/train/cache-1234.arrow", b"left by map()")
    assert listed("huggingface", tmp_path / "saved") == [
        *(f"train data-0000{number}-of-00003.arrow" for number in range(3)),
        "validation data-00000-of-00001.arrow",
    ]
    assert texts_of(source("huggingface", tmp_path / "saved")) == texts["train"] + texts["validation"]
    assert texts_of(source("huggingface", tmp_path / "saved/validation")) == texts["validation"]
    (tmp_path / "hub/data").mkdir(parents=True)
    parts["train"].to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    assert texts_of(source("huggingface", tmp_path / "hub")) == texts["train"]
    (tmp_path / "saved/train/data-00001-of-00003.arrow").unlink()
    with pytest.raises(InputError, match=r"data-00001-of-00003.arrow: missing, but .*state.json lists it"):
        listed("huggingface", tmp_path / "saved")


@pytest.mark.parametrize("files", [5, None, [5], [{}], [{"filename": 3}]])
def test_invalid_state_file_of_datasets_is_an_error(tmp_path: Path, files: object) -> None:
    write(tmp_path / "data.arrow", b"")
    write(tmp_path / "state.json", lines({"_data_files": files}))
    with pytest.raises(InputError, match=r"state.json: cannot be read"):
        listed("huggingface", tmp_path)


# All sources


def test_files_are_sorted_and_no_file_is_an_error(tmp_path: Path) -> None:
    for name in ("b", "a", "c/d"):
        write(tmp_path / f"{name}.jsonl", lines({"text": name}))
    files = list_files("notes", source("jsonl", tmp_path))
    assert [str(Path(file.path).relative_to(tmp_path)) for file in files] == ["a.jsonl", "b.jsonl", "c/d.jsonl"]
    assert files[0] == InputFile(str(tmp_path / "a.jsonl"), "train", len(b'{"text": "a"}\n'))
    assert len(list_files("notes", source("jsonl", tmp_path / "*.jsonl"))) == 2
    with pytest.raises(InputError, match=r"data.sources.notes: no .jsonl"):
        list_files("notes", source("jsonl", tmp_path / "nowhere"))
    write(tmp_path / "test/0.jsonl", b"")
    with pytest.raises(InputError, match=r"under .*t\* \(files not read: 1 test split\)"):
        list_files("notes", source("huggingface", tmp_path / "t*"))


def test_file_that_a_link_repeats_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "raw/a.jsonl", lines({"text": "once"}))
    (tmp_path / "raw/b.jsonl").symlink_to(tmp_path / "raw/a.jsonl")
    write(tmp_path / "elsewhere/c.jsonl", lines({"text": "linked"}))
    for link in ("again", "third"):
        (tmp_path / "raw" / link).symlink_to(tmp_path / "elsewhere")
    skipped: Counter[str] = Counter()
    files = list_files("notes", source("jsonl", tmp_path / "raw"), skipped)
    assert [str(Path(file.path).relative_to(tmp_path / "raw")) for file in files] == ["a.jsonl", "again/c.jsonl"]
    assert skipped == {"link to another file of the source": 2}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("**/*.md", ["a.md", "d/b.md"]),
        ("**/*.md*", ["a.md", "c.md.gz", "d/b.md"]),
        ("*", ["a.md", "c.md.gz", "notes.txt", "Makefile", "d/more.txt"]),  # a folder has only known endings
        ("**", ["a.md", "c.md.gz", "notes.txt", "Makefile", "d/b.md", "d/more.txt"]),
        ("d*", ["d/more.txt"]),
        ("d/b.md", ["d/b.md"]),
        ("", ["notes.txt", "d/more.txt"]),
    ],
)
def test_text_source_reads_what_a_glob_names_whatever_its_ending(tmp_path: Path, path: str, found: list[str]) -> None:
    names = ["a.md", "c.md.gz", "notes.txt", "Makefile", "d/b.md", "d/more.txt", "d/.b.md"]
    for name in names:
        write(tmp_path / name, COMPRESSIONS[".gz" if name.endswith(".gz") else ""](name.encode()))
    assert sorted(texts_of(source("text", f"{tmp_path}/{path}"))) == sorted(found)


def test_other_endings_are_read_with_the_glob_of_the_message(tmp_path: Path) -> None:
    for name in ("a.rst", "d/b.rst", "c.md"):
        write(tmp_path / name, name.encode())
    with pytest.raises(InputError, match=r"data.sources.own: no .txt file .*2 ending .rst.* give a glob") as error:
        list_files("own", source("text", tmp_path))
    assert texts_of(source("text", str(error.value).rpartition("such as ")[2])) == ["a.rst", "d/b.rst"]
    with pytest.raises(InputError, match=r"data.sources.own: no file under .*org"):
        list_files("own", source("text", tmp_path / "*.org"))


def test_text_files_that_differ_in_their_ending_are_two_files(tmp_path: Path) -> None:
    for name in ("a.c", "a.h", "b.txt", "b.txt.gz"):
        write(tmp_path / name, COMPRESSIONS[".gz" if name.endswith(".gz") else ""](b"/* the same */"))
    assert len(list_files("own", source("text", tmp_path / "a.*"))) == 2
    with pytest.raises(InputError, match=r"b.txt and .*b.txt.gz begin with the same text"):
        list_files("own", source("text", tmp_path))


OVERLAPPING: list[tuple[str, dict[str, list[str]], dict[str, list[str]]]] = [
    ("slimpajama", {}, {}),
    ("slimpajama", {"include": ["RedPajamaGithub"]}, {"exclude": ["RedPajamaBook"]}),
    ("slimpajama", {"exclude": ["RedPajamaGithub"]}, {"exclude": ["RedPajamaBook"]}),
    # Both would read a row of an unknown subset.
    ("slimpajama", {"exclude": list(SLIMPAJAMA_SUBSETS[:4])}, {"exclude": list(SLIMPAJAMA_SUBSETS[4:])}),
    ("jsonl", {}, {}),
]


def check_two_sources(tmp_path: Path, format: str, one: dict[str, list[str]], other: dict[str, list[str]]) -> None:
    path = write(tmp_path / "train/a.jsonl", lines(slim("prose"), slim("code", "RedPajamaGithub")))
    (tmp_path / "link.jsonl").symlink_to(path)
    sources = {
        "one": source(format, tmp_path / "train", **one),
        "other": source(format, tmp_path / "link.jsonl", **other),
    }
    check_sources_disjoint(sources, {name: list_files(name, own) for name, own in sources.items()})


@pytest.mark.parametrize(("format", "one", "other"), OVERLAPPING)
def test_two_sources_that_read_one_file_are_an_error(
    tmp_path: Path, format: str, one: dict[str, list[str]], other: dict[str, list[str]]
) -> None:
    with pytest.raises(InputError, match=r"data.sources.other: .*link.jsonl is read by one too"):
        check_two_sources(tmp_path, format, one, other)


@pytest.mark.parametrize("other", [{"exclude": ["RedPajamaGithub"]}, {"include": ["RedPajamaC4"]}])
def test_two_sources_may_read_disjoint_subsets_of_one_file(tmp_path: Path, other: dict[str, list[str]]) -> None:
    check_two_sources(tmp_path, "slimpajama", {"include": ["RedPajamaGithub"]}, other)


def test_excluded_files_are_counted(tmp_path: Path) -> None:
    for path in ("c/0", "go/0", "go/1", "python/0"):
        table(tmp_path / f"star/{path}.parquet", content=["x"])
    for place in ("train/a", "test/b"):
        write(tmp_path / f"slim/{place}.jsonl", lines(slim("x")))
    skipped: Counter[str] = Counter()
    list_files("star", source("starcoderdata", tmp_path / "star", include="c"), skipped)
    list_files("slim", source("slimpajama", tmp_path / "slim"), skipped)
    assert skipped == {"excluded: go": 2, "excluded: python": 1, "test split": 1}


def test_outputs_of_tinyllama_are_read_only_if_the_path_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/demo/corpus/a.jsonl", "raw/runs/b.jsonl"):
        write(Path(name), lines({"text": name}))
    skipped: Counter[str] = Counter()
    files = list_files("own", source("jsonl", "**/*.jsonl"), skipped)
    assert [file.path for file in files] == ["raw/runs/b.jsonl"]
    assert skipped == {OUTPUT: 1}
    for path in ("runs/demo", f"file://{tmp_path}/runs/demo", "runs/**/*.jsonl", "raw/../runs/demo/corpus/a.jsonl"):
        assert listed("jsonl", path) == ["train a.jsonl"]


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_local_urls_are_local_paths(tmp_path: Path, scheme: str) -> None:
    path = write(tmp_path / "raw/a.jsonl", lines({"text": "x"}))
    for place in (path, path.parent, path.parent / "*.jsonl"):
        (file,) = list_files("notes", Source(format="jsonl", path=f"{scheme}{place}", weight=1))
        assert file.path == str(path)
