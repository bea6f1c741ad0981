"""Files with few usable rows are named when a store is prepared, and `--strict` refuses them."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import python_sources, small_recipe, write_jsonl
from tests.prepare.raw import POINTER, lines, slim, write

from tinyllama.cli import main
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.prepare.inspection import find_corruption
from tinyllama.prepare.pipeline import build_store
from tinyllama.recipe import Recipe

GOOD = [{"text": text} for text in python_sources(9)]


def recipe_of(small: Path, folder: Path, format: str = "jsonl", **more: Any) -> Path:
    """Write a recipe whose only source is `folder/raw`."""
    fields = small_recipe(small)
    own = {"format": format, "path": str(folder / "raw"), "weight": 1, **more}
    fields["data"] |= {"store": str(folder / "store"), "sources": {"own": own}, "validation_fraction": 0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return folder / "recipe.yaml"


def write_doubtful(raw: Path) -> dict[str, str]:
    """Write a good file, and files of mostly rejected rows; return the expected warnings of these by name."""
    write(raw / "good.jsonl", lines(*GOOD, *[{"text": ""}] * 9))
    write(raw / "most.jsonl", lines(GOOD[0], b"not json", b"not json", {"body": "x"}))
    write(raw / "all.jsonl", lines({"body": "x"}, {"body": "y"}))
    write(raw / "latin.jsonl", lines(*['{"text": "né"}'.encode("latin-1")] * 3))
    write(raw / "none.jsonl", b"\n")
    return {
        "all.jsonl": "2 of 2 rows rejected (2 no text); set the source's text",
        "latin.jsonl": "3 of 3 rows rejected (3 not UTF-8 text); convert it to UTF-8",
        "most.jsonl": "3 of 4 rows rejected (2 invalid JSON, 1 no text); one JSON object per line",
        "none.jsonl": "contains no rows; exclude it",
    }


@pytest.mark.parametrize("workers", ["1", "2"])
def test_files_with_few_usable_rows_are_named_by_prepare_and_inspect(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    warnings = write_doubtful(tmp_path / "raw")
    recipe = recipe_of(small, tmp_path)
    for command in (
        ["prepare", str(recipe), "--data.workers", workers],
        ["inspect", str(tmp_path / "store")],
        ["prepare", str(recipe)],  # the store is complete
    ):
        assert main(command) == 0
        output = capsys.readouterr().out
        for name, warning in warnings.items():
            assert f"{tmp_path / 'raw' / name}: {warning}" in output
        assert "good.jsonl: " not in output
    assert find_corruption(tmp_path / "store") == []


def test_strict_makes_no_store_and_resumes_with_corrected_files(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_doubtful(tmp_path / "raw")
    command = ["prepare", str(recipe_of(small, tmp_path)), "--strict"]
    assert main(command) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith(f"tinyllama: {tmp_path / 'store'}: 4 files")
    assert "all.jsonl: 2 of 2 rows rejected" in last
    assert not captured.out
    with pytest.raises(InputError, match="is not finished"):
        TokenStore.open(tmp_path / "store")
    for name in names:
        write_jsonl(tmp_path / "raw" / name, ["correct now"])
    assert main(command) == 0
    assert TokenStore.open(tmp_path / "store")["own/train"].num_documents == 9 + 4
    assert "suspect_files" not in TokenStore.open(tmp_path / "store").manifest["sources"]["own"]


def test_strict_refuses_a_store_prepared_without_it(small: Path, tmp_path: Path) -> None:
    write_doubtful(tmp_path / "raw")
    recipe = Recipe.load(recipe_of(small, tmp_path))
    build_store(recipe)
    with pytest.raises(InputError, match=r"store: 4 files"):
        build_store(recipe, strict=True)
    assert build_store(recipe) is not None


def test_excluded_rows_cause_no_warning(small: Path, tmp_path: Path) -> None:
    write(tmp_path / "raw/a.jsonl", lines(*[slim("excluded", "RedPajamaGithub")] * 9))
    write(tmp_path / "raw/b.jsonl", lines(*map(slim, python_sources(3))))
    recipe = Recipe.load(recipe_of(small, tmp_path, "slimpajama", exclude=["RedPajamaGithub"]))
    assert build_store(recipe, strict=True) is not None


def test_many_suspect_files_are_counted_and_the_first_named(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(130):
        write(tmp_path / f"raw/{number:03d}.txt", b"\xff")
    write(tmp_path / "raw/good.txt", b"some text " * 100)
    assert main(["prepare", str(recipe_of(small, tmp_path, "text"))]) == 0
    output = capsys.readouterr().out
    assert output.count("convert it to UTF-8") == 10
    assert "and 120 more files" in output
    found = TokenStore.open(tmp_path / "store").manifest["sources"]["own"]["suspect_files"]
    assert (found["count"], len(found["first"])) == (130, 100)


UTF16 = lines(*GOOD).decode().encode("utf-16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines({"body": "x"}), r"\(1 rows no text\), see .*a.jsonl; set the source's text"),
        (lines(b"{"), "one JSON object per line is expected"),
        (lines(b"not json"), r"\(1 rows invalid JSON\), see .*a.jsonl; one JSON object per line"),
        (b"", r"\(no rows at all\), see .*a.jsonl; add text"),
        (UTF16, "convert it to UTF-8"),
    ],
)
def test_source_without_documents_is_an_error_with_its_remedy(
    small: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    write(tmp_path / "raw/a.jsonl", content)
    with pytest.raises(InputError, match=message):
        build_store(Recipe.load(recipe_of(small, tmp_path)))


def test_repaired_rows_are_kept_and_counted(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = lines(b'{"text": "half\\udc00 a pair", "score": -Infinity}', {"text": "whole " * 50})
    write(tmp_path / "raw/a.jsonl", rows)
    assert main(["prepare", str(recipe_of(small, tmp_path)), "--strict"]) == 0
    assert "1 rows, lone surrogates became U+FFFD" in capsys.readouterr().out
    assert TokenStore.open(tmp_path / "store")["own/train"].manifest["rows"] == {
        "read": 2,
        "kept": 2,
        "dropped": {},
        "changed": {"lone surrogates became U+FFFD": 1},
    }
    assert main(["inspect", str(tmp_path / "store")]) == 0
    output = capsys.readouterr().out
    assert "lone surrogates became U+FFFD" in output
    assert "half\ufffd a pair" in output


def zip_archive(rows: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("rows.jsonl", rows)
    return content.getvalue()


def tar_archive(rows: bytes) -> bytes:
    content, entry = io.BytesIO(), tarfile.TarInfo("rows.jsonl")
    entry.size = len(rows)
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(entry, io.BytesIO(rows))
    return content.getvalue()


ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "a.zip": zip_archive,
    "a.tar": tar_archive,
    "a.tar.gz": lambda rows: gzip.compress(tar_archive(rows)),
}


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("format", ["jsonl", "text"])
def test_archive_that_the_recipe_names_is_an_error(small: Path, tmp_path: Path, name: str, format: str) -> None:
    write(tmp_path / name, ARCHIVES[name](lines(*GOOD)))
    recipe = recipe_of(small, tmp_path, format, path=str(tmp_path / name))
    with pytest.raises(InputError, match=rf"{name}: is a .*archive.*unpack it"):
        build_store(Recipe.load(recipe))
    assert not (tmp_path / "store/manifest.json").exists()


def test_git_pointer_named_json_is_an_error(small: Path, tmp_path: Path) -> None:
    write(tmp_path / "raw/rows.jsonl", lines(*GOOD))
    write(tmp_path / "raw/more.json", POINTER)
    with pytest.raises(InputError, match=r"more\.json: .*git lfs pull"):
        build_store(Recipe.load(recipe_of(small, tmp_path)))


def test_holdout_tail_needs_a_validation_fraction(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sources\.own\.holdout is tail"):
        Recipe.load(recipe_of(small, tmp_path, "text", holdout="tail"))


def test_tokenizer_training_keeps_an_existing_model_and_explains_missing_text(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "raw/a.jsonl", lines(*[{"body": "x"}] * 20))
    recipe, folder = str(recipe_of(small, tmp_path)), tmp_path / "own"
    assert main(["tokenizer", "train", recipe, "--tokenizer", str(folder)]) == 2
    assert "20 rows no text" in capsys.readouterr().err
    write(folder / "tokenizer.model", b"a model that cannot be loaded")
    for place in (folder, folder / "tokenizer.model"):
        assert main(["tokenizer", "train", recipe, "--tokenizer", str(place)]) == 2
        assert "name " in capsys.readouterr().err
    assert (folder / "tokenizer.model").read_bytes() == b"a model that cannot be loaded"
