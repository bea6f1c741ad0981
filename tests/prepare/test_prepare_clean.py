"""Cleaned stores: bad documents are dropped, all others kept, and interruptions change nothing."""

from pathlib import Path
from typing import Any

import pytest
from tests.cli.json_keys import read_documented_json
from tests.conftest import contents, interrupt, write_jsonl

pytest.importorskip("spacy", reason="the extra `clean` is not installed")

from tests.prepare.cleaning import ITEM, prose, with_changed_words

from tinyllama.cli import main
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json
from tinyllama.prepare import decontamination
from tinyllama.prepare.inspection import find_corruption
from tinyllama.prepare.pipeline import build_store
from tinyllama.prepare.tasks import plan_job
from tinyllama.recipe import Recipe


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Write six files of eight good documents each; four of them end with a bad document."""
    files = [[prose(10 * number + k) for k in range(8)] for number in range(6)]
    files[3].append(files[0][2])  # an exact copy
    files[4].append(with_changed_words(files[1][5], 2))  # a near copy
    files[2].append("Too short to be good.")
    files[5].append(f"{prose(998)}\n{ITEM}\n{prose(999)}")
    for number, texts in enumerate(files):
        write_jsonl(tmp_path / f"raw/{number}.jsonl", texts)
    return tmp_path / "raw"


def recipe_at(small: Path, raw: Path, store: Path, **overrides: Any) -> Recipe:
    clean = {"deduplicate": "minhash", "filters": ["gopher_quality"], "decontaminate": ["herons"]}
    source = {"format": "jsonl", "path": str(raw), "weight": 1, "clean": clean}
    fields = {"data.store": str(store), "data.sources": {"web": source}, "data.validation_fraction": 0, **overrides}
    return Recipe.load(small / "recipe.yaml", fields)


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)  # one task per file
    items = {"herons": [ITEM, "An item about something else that nobody has ever written into any document at all"]}
    monkeypatch.setattr(decontamination, "item_texts", lambda tasks: {task: items[task] for task in tasks})


def test_bad_documents_are_dropped_and_counted(
    small: Path, raw: Path, tmp_path: Path, small_tasks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    build_store(recipe_at(small, raw, tmp_path / "store"))
    store = TokenStore.open(tmp_path / "store")
    kept = [(Path(one.file).stem, one.row) for one in store["web/train"].find_documents(range(48))]
    assert kept == [(str(number), row) for number in range(6) for row in range(8)]
    rows = store["web/train"].manifest["rows"]
    assert (rows["read"], rows["kept"], sum(rows["dropped"].values())) == (52, 48, 4)
    assert sorted(reason.partition(":")[0] for reason in rows["dropped"]) == [
        "contaminated",
        "duplicate (minhash)",
        "gopher_quality",
    ]
    found = store.manifest["sources"]["web"]["contamination"]["herons"]
    assert (found["items"], found["found"], found["documents"]) == (2, 1, 1)
    assert main(["inspect", str(tmp_path / "store")]) == 0
    assert "overlap with herons" in capsys.readouterr().out
    assert find_corruption(tmp_path / "store") == []


def test_inspect_names_the_kept_document_of_each_duplicate(
    small: Path, raw: Path, tmp_path: Path, small_tasks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    build_store(recipe_at(small, raw, tmp_path / "store"))
    duplicates = {f"{raw}/3.jsonl row 8": f"{raw}/0.jsonl row 2", f"{raw}/4.jsonl row 8": f"{raw}/1.jsonl row 5"}
    assert main(["inspect", str(tmp_path / "store"), "--duplicates"]) == 0
    lines = [f"{dropped}: duplicate (minhash) of {kept}" for dropped, kept in duplicates.items()]
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["inspect", str(tmp_path / "store"), "--duplicates", "--json"]) == 0
    found = read_documented_json("inspect --duplicates", capsys.readouterr().out)["duplicates"]
    assert {
        f"{one['file']} row {one['row']}": f"{one['kept_file']} row {one['kept_row']}" for one in found
    } == duplicates
    assert main(["inspect", str(tmp_path / "store"), "--duplicates", "--step", "3"]) == 2
    assert "--duplicates" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".work/plan.json", "manifest.json"])
def test_a_store_that_another_version_compared_is_not_resumed(
    small: Path, raw: Path, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = recipe_at(small, raw, tmp_path / "store")
    if name == "manifest.json":
        build_store(recipe)
    else:
        interrupt(recipe, monkeypatch, 9)
    path = tmp_path / "store" / name
    found = read_json(path)
    del found.get("settings", found)["comparison_version"]
    write_json(path, found)
    with pytest.raises(InputError, match=r"store: .*another version of deduplication"):
        build_store(recipe)


def test_workers_and_interruptions_never_change_a_cleaned_store(
    small: Path, raw: Path, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_store(recipe_at(small, raw, tmp_path / "undisturbed"))
    recipe = recipe_at(small, raw, tmp_path / "store")
    assert sum(plan_job(recipe).stages.values()) == 30
    for after in (3, 9, 6, 5):  # finished tasks until each interruption
        interrupt(recipe, monkeypatch, after)
        assert not (tmp_path / "store/manifest.json").exists()
    build_store(recipe_at(small, raw, tmp_path / "store", **{"data.workers": 3}))
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")
