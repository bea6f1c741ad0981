"""Files that gave few documents or none are named when the store is made, and `--strict` makes no store of them."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import python_sources, small_recipe, write_jsonl
from tests.prepare.raw import lines, slim, write

from tinyllama.cli import main
from tinyllama.data.store import TokenStore
from tinyllama.data.verification import find_corruption
from tinyllama.errors import InputError
from tinyllama.prepare.pipeline import prepare_store
from tinyllama.recipe import Recipe


def recipe_of(small: Path, folder: Path, format: str = "jsonl", **more: Any) -> Path:
    """A recipe with one source, `folder/raw`."""
    fields = small_recipe(small)
    own = {"format": format, "path": str(folder / "raw"), "weight": 1, **more}
    fields["data"] |= {"store": str(folder / "store"), "sources": {"own": own}, "validation_fraction": 0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return folder / "recipe.yaml"


def doubtful(raw: Path) -> dict[str, str]:
    """Files of rows that are mostly bad among a good one; by name, what is said of them."""
    texts = [{"text": text} for text in python_sources(9)]
    write(raw / "good.jsonl", lines(*texts, *[{"text": ""}] * 9))
    write(raw / "most.jsonl", lines(texts[0], b"not json", b"not json", {"body": "x"}))
    write(raw / "all.jsonl", lines({"body": "x"}, {"body": "y"}))
    write(raw / "latin.jsonl", lines(*['{"text": "né"}'.encode("latin-1")] * 3))
    write(raw / "none.jsonl", b"\n")
    return {
        "all.jsonl": "2 of 2 rows rejected (2 no text); set the source's text to the field or column that "
        "contains the documents",
        "latin.jsonl": "3 of 3 rows rejected (3 not UTF-8 text); convert it to UTF-8",
        "most.jsonl": "3 of 4 rows rejected (2 invalid JSON, 1 no text); one JSON object per line is expected",
        "none.jsonl": "contains no rows; exclude it if this is not intended",
    }


@pytest.mark.parametrize("workers", ["1", "2"])
def test_files_that_gave_few_documents_are_named_by_prepare_and_inspect(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    wanted = [f"{tmp_path / 'raw' / name}: {said}" for name, said in doubtful(tmp_path / "raw").items()]
    recipe = recipe_of(small, tmp_path)
    for command in (
        ["prepare", str(recipe), "--data.workers", workers],
        ["inspect", str(tmp_path / "store")],
        ["prepare", str(recipe)],  # which finds it finished
    ):
        assert main(command) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line for line in said if line in wanted] == wanted
        assert not any("good.jsonl: " in line for line in said)
    assert find_corruption(tmp_path / "store") == []


def test_strict_makes_no_store_and_goes_on_once_the_files_are_right(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = doubtful(tmp_path / "raw")
    command = ["prepare", str(recipe_of(small, tmp_path)), "--strict"]
    assert main(command) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith(f"tinyllama: {tmp_path / 'store'}: 4 files have few usable rows or none")
    assert "all.jsonl: 2 of 2 rows rejected" in last
    assert not captured.out
    with pytest.raises(InputError, match="is not finished"):
        TokenStore.open(tmp_path / "store")
    for name in names:
        write_jsonl(tmp_path / "raw" / name, ["right now"])
    assert main(command) == 0
    assert TokenStore.open(tmp_path / "store")["own/train"].num_documents == 9 + 4
    assert "files_in_doubt" not in TokenStore.open(tmp_path / "store").manifest["sources"]["own"]


def test_strict_refuses_a_store_that_was_made_without_it(small: Path, tmp_path: Path) -> None:
    doubtful(tmp_path / "raw")
    recipe = Recipe.load(recipe_of(small, tmp_path))
    prepare_store(recipe)
    with pytest.raises(InputError, match=r"store: 4 files have few usable rows"):
        prepare_store(recipe, strict=True)
    assert prepare_store(recipe) is not None


def test_rows_that_the_recipe_leaves_out_put_no_file_in_doubt(small: Path, tmp_path: Path) -> None:
    write(tmp_path / "raw/a.jsonl", lines(*[slim("out", "RedPajamaGithub")] * 9))
    write(tmp_path / "raw/b.jsonl", lines(*map(slim, python_sources(3))))
    recipe = Recipe.load(recipe_of(small, tmp_path, "slimpajama", exclude=["RedPajamaGithub"]))
    assert prepare_store(recipe, strict=True) is not None


def test_of_many_files_in_doubt_the_first_are_named_and_all_are_counted(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(130):
        write(tmp_path / f"raw/{number:03d}.txt", b"\xff")
    write(tmp_path / "raw/good.txt", b"some text " * 100)
    assert main(["prepare", str(recipe_of(small, tmp_path, "text"))]) == 0
    said = capsys.readouterr().out.splitlines()
    assert sum("convert it to UTF-8" in line for line in said) == 10
    assert said[-1].startswith("and 120 more files")
    found = TokenStore.open(tmp_path / "store").manifest["sources"]["own"]["files_in_doubt"]
    assert (found["count"], len(found["first"])) == (130, 100)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lines({"body": "x"}), r"\(1 rows no text\), see .*a.jsonl; set the source's text"),
        (lines(b"{"), "one JSON object per line is expected"),
        (lines(b"not json"), r"\(1 rows invalid JSON\), see .*a.jsonl; one JSON object per line is expected"),
        (b"", r"\(no rows at all\), see .*a.jsonl; add text"),
    ],
)
def test_a_source_without_a_document_has_the_remedy_for_its_cause(
    small: Path, tmp_path: Path, content: bytes, said: str
) -> None:
    write(tmp_path / "raw/a.jsonl", content)
    with pytest.raises(InputError, match=said):
        prepare_store(Recipe.load(recipe_of(small, tmp_path)))


def test_repaired_rows_are_kept_and_counted(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        tmp_path / "raw/a.jsonl", lines(b'{"text": "half\\udc00 a pair", "score": -Infinity}', {"text": "whole " * 50})
    )
    assert main(["prepare", str(recipe_of(small, tmp_path)), "--strict"]) == 0
    assert "    changed: 1 rows, lone surrogates became U+FFFD" in capsys.readouterr().out.splitlines()
    assert TokenStore.open(tmp_path / "store")["own/train"].manifest["rows"] == {
        "read": 2,
        "kept": 2,
        "left_out": {},
        "changed": {"lone surrogates became U+FFFD": 1},
    }
    assert main(["inspect", str(tmp_path / "store")]) == 0
    said = capsys.readouterr().out
    assert "1  kept, but lone surrogates became U+FFFD" in said
    assert "half\ufffd a pair" in said


def test_the_store_of_files_without_a_fault_says_nothing_more(small: Path) -> None:
    manifest = TokenStore.open(small / "store").manifest
    for source in manifest["sources"].values():
        assert set(source) == {"format", "text", "include", "exclude", "clean", "splits", "files_left_out"}
    assert set(TokenStore.open(small / "store")["lines/train"].manifest["rows"]) == {"read", "kept", "left_out"}
    assert "changed" not in json.dumps(manifest)


def archives() -> dict[str, bytes]:
    """An archive of each kind whose first file is rows, by its file's name."""
    rows, packed = lines(*({"text": text} for text in python_sources(9))), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("rows.jsonl", rows)
    with tarfile.open(fileobj=(tape := io.BytesIO()), mode="w") as archive_of_files:
        entry = tarfile.TarInfo("rows.jsonl")
        entry.size = len(rows)
        archive_of_files.addfile(entry, io.BytesIO(rows))
    return {"a.zip": packed.getvalue(), "a.tar": tape.getvalue(), "a.tar.gz": gzip.compress(tape.getvalue())}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("format", ["jsonl", "text"])
def test_an_archive_that_is_named_is_no_text(small: Path, tmp_path: Path, name: str, format: str) -> None:
    write(tmp_path / name, archives()[name])
    recipe = recipe_of(small, tmp_path, format, path=str(tmp_path / name))
    with pytest.raises(InputError, match=rf"{name}: is a .*archive.*unpack it"):
        prepare_store(Recipe.load(recipe))
    assert not (tmp_path / "store/manifest.json").exists()


def test_a_pointer_named_json_beside_rows_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    write(tmp_path / "raw/rows.jsonl", lines(*({"text": text} for text in python_sources(9))))
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    write(tmp_path / "raw/more.json", pointer.encode())
    with pytest.raises(InputError, match=r"more\.json: a git-lfs pointer.*git lfs pull"):
        prepare_store(Recipe.load(recipe_of(small, tmp_path)))


def test_rows_in_utf16_are_to_be_converted(small: Path, tmp_path: Path) -> None:
    write(tmp_path / "raw/a.jsonl", lines(*({"text": text} for text in python_sources(9))).decode().encode("utf-16"))
    with pytest.raises(InputError, match="convert it to UTF-8"):
        prepare_store(Recipe.load(recipe_of(small, tmp_path)))


def test_a_tail_is_a_share_above_0(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sources\.own\.holdout is tail"):
        Recipe.load(recipe_of(small, tmp_path, "text", holdout="tail"))


def test_training_a_tokenizer_keeps_anothers_model_and_says_why_there_is_no_text(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "raw/a.jsonl", lines(*[{"body": "x"}] * 20))
    recipe, folder = str(recipe_of(small, tmp_path)), tmp_path / "own"
    assert main(["tokenizer", "train", recipe, "--tokenizer", str(folder)]) == 2
    assert "20 no text" in capsys.readouterr().err
    write(folder / "tokenizer.model", b"a model that cannot be loaded")
    for place in (folder, folder / "tokenizer.model"):
        assert main(["tokenizer", "train", recipe, "--tokenizer", str(place)]) == 2
        assert "name " in capsys.readouterr().err
    assert (folder / "tokenizer.model").read_bytes() == b"a model that cannot be loaded"
