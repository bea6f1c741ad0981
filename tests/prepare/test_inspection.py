"""Inspection: counts of a store, and the file and row of every token."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.cli.json_keys import read_documented_json
from tests.conftest import python_sources

from tinyllama.cli import main
from tinyllama.data.order import sequences
from tinyllama.data.store import TokenStore
from tinyllama.files import write_json_with_sha256
from tinyllama.prepare.pipeline import build_store
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer


def text_of(file: str, row: int) -> str:
    text: str = json.loads(Path(file).read_text().splitlines()[row])["text"]
    return text


@pytest.mark.parametrize("name", ["modules/train", "modules/validation", "lines/train", "lines/validation"])
def test_every_document_is_traced_to_its_file_and_row(small: Path, name: str) -> None:
    split = TokenStore.open(small / "store")[name]
    tokenizer = Tokenizer.load(small / "tokenizer")
    start = 0
    for document in split.find_documents(range(split.num_documents)):
        assert document.start == start
        start += document.tokens
        tokens = split.read(document.start, start)
        assert tokens[1:-1].tolist() == tokenizer.encode(text_of(document.file, document.row))
    assert start == split.num_tokens


def test_documents_between_have_a_token_in_the_range(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)  # more than one shard
    build_store(Recipe.load(small / "recipe.yaml", {"data.store": str(tmp_path / "store")}))
    split = TokenStore.open(tmp_path / "store")["modules/train"]
    assert len(split.shards) == 2
    every = list(split.find_documents(range(split.num_documents)))
    edge = split.shards[0].tokens
    for start, stop in ((0, 1), (edge - 1, edge), (edge, edge + 1), (edge - 500, edge + 500), (7, split.num_tokens)):
        wanted = [one for one in every if one.start < stop and one.start + one.tokens > start]
        assert list(split.documents_between(start, stop)) == wanted


def test_a_row_of_a_step_is_traced_to_its_text(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, store = Recipe.load(small / "recipe.yaml"), TokenStore.open(small / "store")
    arguments = ["inspect", str(small / "store"), "--recipe", str(small / "recipe.yaml"), "--step", "7", "--row", "2"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    source, epoch, index = sequences(recipe, store, 7)[2].tolist()
    name = f"{list(recipe.data.sources)[source]}/train"
    assert f"sequence {index:,} of {name}, epoch {epoch}" in output
    split = store[name]
    for document in split.documents_between(index * 64, index * 64 + 65):
        assert f"{document.file} row {document.row}, file's sha256 {document.sha256[:12]}" in output
    decoded = Tokenizer.load(small / "tokenizer").decode(split.read(index * 64, index * 64 + 10).tolist())
    assert repr(decoded)[1:-1][:10] in output


def test_inspect_shows_counts_shares_and_samples(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small / "recipe.yaml")]) == 0
    output = capsys.readouterr().out
    store = TokenStore.open(small / "store")
    split, manifest = store["lines/train"], store["lines/train"].manifest
    assert f"{split.num_documents:,}" in output
    assert f"{split.num_tokens:,}" in output
    assert f"{manifest['text_bytes'] / split.num_tokens:.3f}" in output
    assert "held out for validation" in output
    assert "manifest " + store.digest[:12] in output
    texts = [text_of(one.file, one.row) for one in split.find_documents(range(split.num_documents))]
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert repr(texts[0])[1:20] in output


@pytest.mark.parametrize(("flags", "count"), [([], 1), (["--samples", "3"], 3), (["--samples", "0"], 0)])
def test_samples_are_spread_over_the_documents_of_each_source(
    small: Path, capsys: pytest.CaptureFixture[str], flags: list[str], count: int
) -> None:
    assert main(["inspect", str(small / "store"), "--json", *flags]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    for source in ("modules", "lines"):
        own = [one for one in samples if one["split"].startswith(source)]
        assert len(own) == count
        assert not own or (own[0]["split"], own[0]["document"]) == (f"{source}/train", 0)
        assert all(text_of(one["file"], one["row"]).startswith(one["text"]) for one in own)
    if count == 3:
        last = TokenStore.open(small / "store")["lines/validation"].num_documents - 1
        assert (samples[-1]["split"], samples[-1]["document"]) == ("lines/validation", last)


@pytest.fixture
def run(small: Path, tmp_path: Path) -> RunDir:
    """A run that was trained on the small store, without checkpoints."""
    run = RunDir(tmp_path / "runs/small")
    run.path.mkdir(parents=True)
    shutil.copyfile(small / "recipe.yaml", run.recipe_path)
    shutil.copyfile(small / "store/manifest.json", run.store_manifest_path)
    return run


def test_inspect_of_a_run_shows_its_store_and_traces_its_rows(
    small: Path, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    store, recipe = str(small / "store"), ["--recipe", str(small / "recipe.yaml")]
    for flags in ([], ["--verify"], ["--step", "7", "--row", "2"]):
        assert main(["inspect", str(run.path), *flags]) == 0
        output = capsys.readouterr()
        assert main(["inspect", store, *flags, *(recipe if "--step" in flags else [])]) == 0
        assert output.out == capsys.readouterr().out
        assert "another store" not in output.err


def test_inspect_of_a_run_reports_a_changed_or_missing_store(
    small: Path, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run.store_manifest_path.write_text("{}")
    assert main(["inspect", str(run.path)]) == 0
    assert f"{small / 'store'}: another store than the one" in capsys.readouterr().err
    recipe = run.recipe_path.read_text().replace(str(small / "store"), "gone")
    run.recipe_path.write_text(recipe)
    assert main(["inspect", str(run.path)]) == 2
    assert "the store of this run, gone, is not here" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["5", "{}", "{store: 5}"])
def test_inspect_of_a_run_whose_recipe_names_no_store_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str
) -> None:
    run = RunDir(tmp_path)
    run.recipe_path.write_text(f"name: x\ndata: {data}\n")
    assert main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"tinyllama: {run.recipe_path}: no data.store; ")


@pytest.mark.parametrize(
    ("command", "flags"),
    [("inspect", []), ("inspect --step", ["--step", "7"]), ("inspect --verify", ["--verify"])],
)
def test_json_has_the_documented_keys(
    run: RunDir, capsys: pytest.CaptureFixture[str], command: str, flags: list[str]
) -> None:
    assert main(["inspect", str(run.path), "--json", *flags]) == 0
    read_documented_json(command, capsys.readouterr().out)


def test_subsets_are_counted_separately(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subsets = ["RedPajamaC4", "RedPajamaBook", "RedPajamaC4", "RedPajamaGithub"]
    rows = [
        {"text": f"words of document {n} " * 50, "meta": {"redpajama_set_name": name}} for n, name in enumerate(subsets)
    ]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"format": "slimpajama", "path": str(tmp_path / "raw"), "weight": 1, "exclude": ["RedPajamaGithub"]}
    build_store(
        Recipe.load(
            small / "recipe.yaml",
            {"data.store": str(tmp_path / "store"), "data.sources": {"slim": source}, "data.validation_fraction": 0},
        )
    )
    manifest = TokenStore.open(tmp_path / "store")["slim/train"].manifest
    assert {name: tally["documents"] for name, tally in manifest["subsets"].items()} == {
        "RedPajamaBook": 1,
        "RedPajamaC4": 2,
    }
    assert np.sum([tally["tokens"] for tally in manifest["subsets"].values()]) == manifest["tokens"]
    assert main(["inspect", str(tmp_path / "store")]) == 0
    output = capsys.readouterr().out
    assert "excluded: RedPajamaGithub" in output
    assert "  RedPajamaBook" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step", "3"], "give both --recipe and --step"),
        (["--recipe", "RECIPE", "--step", "40"], "--step 40: the recipe's steps are 0 to 39"),
        (["--recipe", "RECIPE", "--step", "3", "--row", "6"], "--row 6: the rows of a step are 0 to 5"),
        (["--tokenizer", "OTHER"], "not the tokenizer that"),
        (
            ["--recipe", "demo", "--step", "3"],
            "made with ",
        ),
    ],
)
def test_impossible_traces_are_refused_in_one_line(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    from tinyllama.tokenizer.training import train_tokenizer, training_text

    if "OTHER" in flags:
        train_tokenizer(training_text(python_sources(3)), 500).save(tmp_path / "other", 64)
        capsys.readouterr()  # the progress
    names = {"RECIPE": str(small / "recipe.yaml"), "OTHER": str(tmp_path / "other")}
    assert main(["inspect", str(small / "store"), *(names.get(flag, flag) for flag in flags)]) == 2
    output = capsys.readouterr().err.splitlines()
    assert message in output[-1]
    assert len(output) == 1


def test_inspect_shows_counts_without_the_tokenizer(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small / "store", tmp_path / "store")
    manifest = tmp_path / "store/manifest.json"
    write_json_with_sha256(manifest, json.loads(manifest.read_text().replace(str(small / "tokenizer"), "gone")))
    assert main(["inspect", str(tmp_path / "store")]) == 0
    assert "no longer at gone; give its path with --tokenizer" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "store"), "--tokenizer", str(small / "tokenizer")]) == 0
    assert "no longer at" not in capsys.readouterr().out


@pytest.mark.parametrize("field", ["tokenizer", "inputs", "validation_fraction", "document"])
def test_manifest_without_a_field_is_refused_in_one_line(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    shutil.copytree(small / "store", tmp_path / "store")
    manifest = tmp_path / "store/manifest.json"
    fields = json.loads(manifest.read_text())
    del fields[field]
    write_json_with_sha256(manifest, fields)
    trace = ["--recipe", str(small / "recipe.yaml"), "--step", "3"] if field == "validation_fraction" else []
    assert main(["inspect", str(tmp_path / "store"), *trace]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"store: a file there is invalid (KeyError: '{field}')" in line
