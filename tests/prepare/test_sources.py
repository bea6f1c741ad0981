"""A source's files: all of them, each once, in the right split, or a named error."""

from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from pydantic import ValidationError
from tests.prepare.raw import lines, slim, source, texts_of, write

from tinyllama.errors import InputError
from tinyllama.prepare.readers import RejectedRow, SourceRow, read_rows
from tinyllama.prepare.sources import InputFile, check_sources_disjoint, list_files
from tinyllama.recipe import SLIMPAJAMA_SUBSETS, Source


def table(path: Path, **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def listed(format: str, path: Path | str, **more: object) -> list[str]:
    """Names of a source's files, with their splits."""
    return [f"{file.split} {Path(file.path).name}" for file in list_files("own", source(format, path, **more))]


def test_slimpajama_leaves_out_its_test_split_and_the_excluded_subset(tmp_path: Path) -> None:
    rows = lines(slim("prose"), slim("code", "RedPajamaGithub"), {"text": "no meta"})
    for place in ("train/chunk1/a", "train/chunk2/b", "validation/chunk1/c", "test/chunk1/d"):
        write(tmp_path / f"{place}.jsonl.zst", zstandard.compress(rows))
    recipe = source("slimpajama", tmp_path, exclude=["RedPajamaGithub"])
    files = list_files("slim", recipe)
    assert [(Path(file.path).name[0], file.split) for file in files] == [
        ("a", "train"),
        ("b", "train"),
        ("c", "validation"),
    ]
    assert list(read_rows(files[0].path, recipe)) == [
        SourceRow(0, "prose", "RedPajamaC4"),
        RejectedRow(1, "excluded: RedPajamaGithub", is_intentional=True),
        RejectedRow(2, "no meta.redpajama_set_name"),
    ]
    # By a glob too, in which the split's folder is a wildcard.
    assert listed("slimpajama", tmp_path / "*/chunk1/*.zst") == ["train a.jsonl.zst", "validation c.jsonl.zst"]


def test_slimpajama_s_parquet_copies_keep_their_splits(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"):
        table(tmp_path / "data" / f"{name}.parquet", text=["x"], meta=[{"redpajama_set_name": "RedPajamaC4"}])
    assert listed("slimpajama", tmp_path) == [
        "train train-00000-of-00002.parquet",
        "train train-00001-of-00002.parquet",
        "validation validation-00000-of-00001.parquet",
    ]


@pytest.mark.parametrize("choice", ["include", "exclude"])
def test_a_subset_that_slimpajama_lacks_is_refused_with_the_nearest(choice: str) -> None:
    with pytest.raises(
        ValidationError, match=r"RedPajamaGitHub is not a subset of SlimPajama; did you mean RedPajamaGith"
    ):
        source("slimpajama", "raw", **{choice: ["RedPajamaGitHub"]})
    with pytest.raises(ValidationError, match=r"format jsonl has no subsets"):
        source("jsonl", "raw", **{choice: ["RedPajamaGithub"]})


def test_a_subset_is_not_included_and_excluded() -> None:
    with pytest.raises(ValidationError, match=r"python is included and excluded"):
        source("starcoderdata", "raw", include=["python"], exclude=["python", "c"])


def test_starcoderdata_reads_the_languages_that_the_recipe_names(tmp_path: Path) -> None:
    for language in ("c", "go", "python"):
        table(
            tmp_path / language / "train-00000-of-00001.parquet",
            content=[f"{language} 1", None, f"{language} 2"],
            id=[1, 2, 3],
        )
    assert len(list_files("star", source("starcoderdata", tmp_path))) == 3
    all_but_go = source("starcoderdata", tmp_path, exclude=["go"])
    assert [Path(file.path).parent.name for file in list_files("star", all_but_go)] == ["c", "python"]
    only_go = source("starcoderdata", tmp_path, include=["go"])
    files = list_files("star", only_go)
    assert [Path(file.path).parent.name for file in files] == ["go"]
    assert list(read_rows(files[0].path, only_go)) == [
        SourceRow(0, "go 1", "go"),
        RejectedRow(1, "no content"),
        SourceRow(2, "go 2", "go"),
    ]


@pytest.mark.parametrize("choice", ["include", "exclude"])
def test_a_language_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path, choice: str) -> None:
    for language in ("javascript", "python"):
        table(tmp_path / language / "train-00000-of-00001.parquet", content=["x"])
    with pytest.raises(
        InputError, match=rf"data.sources.star.{choice}: 'pyton' is not a folder .* did you mean python\?"
    ):
        list_files("star", source("starcoderdata", tmp_path, **{choice: ["pyton"]}))


def test_a_folder_of_starcoderdata_with_other_columns_is_refused_by_name_before_any_work(tmp_path: Path) -> None:
    commits = table(tmp_path / "git-commits-cleaned/train-0.parquet", message=["mend"], diff=["+x"])
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


def test_a_hub_folder_s_splits_follow_the_hub_s_words(tmp_path: Path) -> None:
    places = {
        "plain.jsonl": "train",
        "data/train-00000-of-00001.jsonl": "train",
        "data/validation-00000-of-00001.jsonl": "validation",
        "data/test-00000-of-00001.jsonl": None,
        "dev/test_of_patience.jsonl": "validation",  # a folder's word counts before a file's
        "my-valid.jsonl": "validation",
        "evaluation/0.jsonl": None,
        "contest/latest.jsonl": "train",  # no word of their own
        "Test/0.jsonl": None,
    }
    for place in places:
        write(tmp_path / place, lines({"text": place}))
    write(tmp_path / "README.md", b"# A data set")
    write(tmp_path / "dataset_infos.json", b"{}")
    write(tmp_path / ".cache/huggingface/download/data/train-00000-of-00001.jsonl", b"")
    found = {
        str(Path(file.path).relative_to(tmp_path)): file.split
        for file in list_files("hub", source("huggingface", tmp_path))
    }
    assert found == {place: split for place, split in places.items() if split}


def test_a_hub_folder_with_two_kinds_of_files_is_refused(tmp_path: Path) -> None:
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


def test_a_folder_that_datasets_wrote_is_read_split_by_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = {split: [f"{split} {number}" for number in range(2500)] for split in ("train", "validation", "test")}
    parts = {split: datasets.Dataset.from_dict({"id": range(2500), "text": own}) for split, own in texts.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved", num_shards={"train": 3, "validation": 1, "test": 1})
    write(tmp_path / "saved/train/cache-1234.arrow", b"what map() left behind")
    saved = source("huggingface", tmp_path / "saved")
    files = list_files("saved", saved)
    assert [(Path(file.path).name, file.split) for file in files] == [
        ("data-00000-of-00003.arrow", "train"),
        ("data-00001-of-00003.arrow", "train"),
        ("data-00002-of-00003.arrow", "train"),
        ("data-00000-of-00001.arrow", "validation"),
    ]
    assert texts_of(saved) == texts["train"] + texts["validation"]
    # One split of it, and the same rows as parquet.
    assert texts_of(source("huggingface", tmp_path / "saved/validation")) == texts["validation"]
    (tmp_path / "hub/data").mkdir(parents=True)
    parts["train"].to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    assert texts_of(source("huggingface", tmp_path / "hub")) == texts["train"]
    (tmp_path / "saved/train/data-00001-of-00003.arrow").unlink()
    with pytest.raises(InputError, match=r"data-00001-of-00003.arrow: missing, but .*state.json lists it"):
        list_files("saved", saved)


def test_folders_and_globs_list_in_sorted_order_and_nothing_is_an_error(tmp_path: Path) -> None:
    for name in ("b", "a", "c/d"):
        write(tmp_path / f"{name}.jsonl", lines({"text": name}))
    everything = list_files("notes", source("jsonl", tmp_path))
    assert [str(Path(file.path).relative_to(tmp_path)) for file in everything] == ["a.jsonl", "b.jsonl", "c/d.jsonl"]
    assert everything[0] == InputFile(str(tmp_path / "a.jsonl"), "train", len(b'{"text": "a"}\n'))
    assert len(list_files("notes", source("jsonl", tmp_path / "*.jsonl"))) == 2
    with pytest.raises(InputError, match=r"data.sources.notes: no .jsonl"):
        list_files("notes", source("jsonl", tmp_path / "nowhere"))
    write(tmp_path / "test/0.jsonl", b"")
    with pytest.raises(InputError, match=r"under .*t\* \(files not read: 1 test split\)"):
        list_files("notes", source("huggingface", tmp_path / "t*"))


def test_a_file_that_a_link_shows_twice_is_refused_by_both_names(tmp_path: Path) -> None:
    write(tmp_path / "raw/a.jsonl", lines({"text": "once"}))
    (tmp_path / "raw/b.jsonl").symlink_to(tmp_path / "raw/a.jsonl")
    with pytest.raises(InputError, match=r"data.sources.notes: .*a.jsonl and .*b.jsonl are one file"):
        list_files("notes", source("jsonl", tmp_path / "raw"))
    (tmp_path / "raw/b.jsonl").unlink()
    (tmp_path / "raw/again").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "elsewhere/c.jsonl", lines({"text": "linked"}))
    assert texts_of(source("jsonl", tmp_path / "raw")) == ["once", "linked"]
    (tmp_path / "raw/third").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"again/c.jsonl and .*third/c.jsonl are one file"):
        list_files("notes", source("jsonl", tmp_path / "raw"))


def test_two_sources_do_not_read_one_file_unless_their_subsets_are_disjoint(tmp_path: Path) -> None:
    path = write(tmp_path / "train/a.jsonl", lines(slim("prose"), slim("code", "RedPajamaGithub")))
    (tmp_path / "link.jsonl").symlink_to(path)

    def check(one: dict[str, list[str]], other: dict[str, list[str]], format: str = "slimpajama") -> None:
        sources = {
            "one": source(format, tmp_path / "train", **one),
            "other": source(format, tmp_path / "link.jsonl", **other),
        }
        check_sources_disjoint(sources, {name: list_files(name, own) for name, own in sources.items()})

    check({"include": ["RedPajamaGithub"]}, {"exclude": ["RedPajamaGithub"]})
    check({"include": ["RedPajamaGithub"]}, {"include": ["RedPajamaC4"]})
    overlapping: list[tuple[dict[str, list[str]], dict[str, list[str]]]] = [
        ({}, {}),
        ({"include": ["RedPajamaGithub"]}, {"exclude": ["RedPajamaBook"]}),
        ({"exclude": ["RedPajamaGithub"]}, {"exclude": ["RedPajamaBook"]}),
        # A row of yet another subset would be read by both.
        ({"exclude": list(SLIMPAJAMA_SUBSETS[:4])}, {"exclude": list(SLIMPAJAMA_SUBSETS[4:])}),
    ]
    for one, other in overlapping:
        with pytest.raises(InputError, match=r"data.sources.other: .*link.jsonl is read by one too"):
            check(one, other)
    with pytest.raises(InputError, match=r"data.sources.other: .*link.jsonl is read by one too"):
        check({}, {}, "jsonl")


def test_files_that_are_left_out_are_counted(tmp_path: Path) -> None:
    for language, count in (("c", 1), ("go", 2), ("python", 1)):
        (tmp_path / "star" / language).mkdir(parents=True)
        for number in range(count):
            pyarrow.parquet.write_table(
                pyarrow.table({"content": ["x"]}), tmp_path / f"star/{language}/{number}.parquet"
            )
    for place in ("train/a", "test/b"):
        write(tmp_path / f"slim/{place}.jsonl", lines(slim("x")))
    left_out: Counter[str] = Counter()
    list_files("star", source("starcoderdata", tmp_path / "star", include="c"), left_out)
    list_files("slim", source("slimpajama", tmp_path / "slim"), left_out)
    assert left_out == {"excluded: go": 2, "excluded: python": 1, "test split": 1}


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_local_urls_are_local_paths(tmp_path: Path, scheme: str) -> None:
    path = write(tmp_path / "raw/a.jsonl", lines({"text": "x"}))
    for place in (path, path.parent, path.parent / "*.jsonl"):
        (file,) = list_files("notes", Source(format="jsonl", path=f"{scheme}{place}", weight=1))
        assert file.path == str(path)
