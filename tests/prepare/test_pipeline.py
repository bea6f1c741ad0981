"""The store's bytes depend on inputs and recipe alone, and every row is kept, counted or listed."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
import zstandard
from tests.conftest import contents, interrupt, locked_by_another_process, python_sources, write_jsonl
from tests.data.reading import documents_of

from tinyllama.cli import main
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.files import sha256_of
from tinyllama.prepare.inspection import find_corruption
from tinyllama.prepare.pipeline import build_store
from tinyllama.prepare.tasks import Job, run_task
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.training import train_tokenizer, training_text


def recipe_at(small: Path, store: Path, **overrides: Any) -> Recipe:
    return Recipe.load(small / "recipe.yaml", {"data.store": str(store), **overrides})


def prepared(recipe: Recipe) -> TokenStore:
    store = build_store(recipe)
    assert store is not None
    return store


def test_every_kept_document_is_stored_between_bos_and_eos(small: Path) -> None:
    recipe, store = Recipe.load(small / "recipe.yaml"), TokenStore.open(small / "store")
    tokenizer = Tokenizer.load(recipe.tokenizer)
    texts = [json.loads(line)["text"] for name in "ab" for line in (small / f"raw/modules/{name}.jsonl").open()]
    stored = []
    for split in ("modules/train", "modules/validation"):
        for tokens in documents_of(store[split]):
            assert tokens[0] == tokenizer.bos_id
            assert tokens[-1] == tokenizer.eos_id
            stored.append(tuple(tokens[1:-1].tolist()))
    assert sorted(stored) == sorted(tuple(tokenizer.encode(text)) for text in texts)
    assert store["modules/validation"].num_documents > 0


def test_rows_read_are_rows_kept_and_rows_dropped(small: Path) -> None:
    store = TokenStore.open(small / "store")
    for source in ("modules", "lines"):
        rows = store[f"{source}/train"].manifest["rows"]
        assert rows["read"] == rows["kept"] + sum(rows["dropped"].values())
        assert rows["dropped"]["held out for validation"] == store[f"{source}/validation"].num_documents
    assert find_corruption(store.folder) == []


def test_workers_and_interruptions_never_change_the_bytes(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)  # one task per file
    build_store(recipe_at(small, tmp_path / "one"))
    expected = contents(tmp_path / "one")
    assert "modules/train/00001.tokens" in expected

    interrupt(recipe_at(small, tmp_path / "two"), monkeypatch, after=2)
    with pytest.raises(InputError, match="is not finished"):
        TokenStore.open(tmp_path / "two")

    def counting(job: Job, stage: str, rank: int) -> None:
        assert rank >= 2, "done again"
        run_task(job, stage, rank)

    monkeypatch.setattr("tinyllama.prepare.executors.run_task", counting)
    build_store(recipe_at(small, tmp_path / "two"))
    assert contents(tmp_path / "two") == expected
    assert prepared(recipe_at(small, tmp_path / "two")).digest == TokenStore.open(tmp_path / "one").digest


@pytest.mark.slow
def test_prepare_killed_repeatedly_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    texts = python_sources(150)
    for number in range(12):
        write_jsonl(raw / f"{number:02d}.jsonl", texts[number * 12 :] + texts)
    paths = {"data.sources.modules.path": str(raw), "data.sources.lines.path": str(small / "raw/lines")}
    flags = [word for field, value in paths.items() for word in (f"--{field}", value)]
    command = [sys.executable, "-m", "tinyllama", "prepare", str(small / "recipe.yaml"), *flags, "--data.store"]
    command += [str(tmp_path / "killed"), "--data.workers"]
    chance = random.Random(3)
    kills = 0
    for workers in (2, 1, 3, 2, 1, 2):
        process = subprocess.Popen([*command, str(workers)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / "killed/.work").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.random())
        kills += process.poll() is None
        process.kill()  # workers end with it, so that none runs next to the next call
        process.wait()
    assert kills > 1
    subprocess.run([*command, "2"], check=True, capture_output=True)
    build_store(recipe_at(small, tmp_path / "undisturbed", **paths))
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert find_corruption(tmp_path / "killed") == []


def test_unfinished_deletion_of_work_is_completed(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_at(small, tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr("tinyllama.prepare.tasks.Job.delete_work", lambda _: None)
        prepared(recipe)
    assert (tmp_path / "store/.work").is_dir()
    prepared(recipe)
    assert contents(tmp_path / "store") == contents(small / "store")


@pytest.mark.parametrize("workers", [1, 2])
def test_files_at_a_url_give_the_same_store(small: Path, tmp_path: Path, workers: int) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(small / "raw/modules"), "/modules", recursive=True)
    paths = {"data.sources.modules.path": "memory://modules", "data.workers": workers}
    store = prepared(recipe_at(small, tmp_path / "store", **paths))
    here, there = (contents(folder / "modules/train") for folder in (small / "store", tmp_path / "store"))
    assert there.keys() == here.keys()
    for name in here.keys() - {"manifest.json"}:
        assert there[name] == here[name]
    inputs = store["modules/train"].manifest["shards"][0]["inputs"]
    assert [entry["path"] for entry in inputs] == ["memory://modules/a.jsonl", "memory://modules/b.jsonl"]
    assert inputs[0]["sha256"] == sha256_of(small / "raw/modules/a.jsonl")
    assert prepared(recipe_at(small, tmp_path / "store", **paths)).digest == store.digest
    memory.rm("/modules", recursive=True)


def test_bad_rows_are_listed_and_counted(small: Path, tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw/a.jsonl", python_sources(5))
    with raw.open("ab") as file:
        file.write(b'{"text": 7}\nnot json\n')
    overrides = {"data.sources.modules.path": str(tmp_path / "raw"), "data.validation_fraction": 0}
    store = prepared(recipe_at(small, tmp_path / "store", **overrides))
    assert store["modules/train"].manifest["rows"] == {
        "read": 7,
        "kept": 5,
        "dropped": {"invalid JSON": 1, "text is not text": 1},
    }
    rejects = [json.loads(line) for line in (tmp_path / "store/modules/train/rejects.jsonl").open()]
    assert rejects == [
        {"file": str(raw), "row": 5, "line": 6, "reason": "text is not text"},
        {"file": str(raw), "row": 6, "line": 7, "reason": "invalid JSON"},
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_file_is_named_and_leaves_no_store(small: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(small / "raw/modules", tmp_path / "raw")
    packed = zstandard.compress((tmp_path / "raw/b.jsonl").read_bytes())
    (tmp_path / "raw/c.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    recipe = recipe_at(
        small, tmp_path / "store", **{"data.sources.modules.path": str(tmp_path / "raw"), "data.workers": workers}
    )
    with pytest.raises(InputError, match=r"c.jsonl.zst: cannot be read .*fetch it again"):
        build_store(recipe)
    assert multiprocessing.active_children() == []  # a late worker would write into the work of the next call
    with pytest.raises(InputError, match=r"is not finished; run `tinyllama prepare`"):
        TokenStore.open(tmp_path / "store")
    (tmp_path / "raw/c.jsonl.zst").write_bytes(packed)  # with the file repaired, the same command resumes
    build_store(recipe)
    assert find_corruption(tmp_path / "store") == []


def test_a_store_of_other_data_is_not_overwritten(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"made with validation_fraction 0.1, but the recipe has 0.2"):
        build_store(recipe_at(small, small / "store", **{"data.validation_fraction": 0.2}))
    train_tokenizer(training_text(python_sources(3)), 500).save(tmp_path.parent / "other", 64)
    with pytest.raises(InputError, match=r"made with another tokenizer \(sha256 \w{12}, not \w{12}\); choose"):
        build_store(recipe_at(small, small / "store", tokenizer=str(tmp_path.parent / "other")))
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"has files but no token store"):
        build_store(recipe_at(small, tmp_path))


def test_two_processes_never_prepare_one_store(small: Path, tmp_path: Path) -> None:
    with (
        locked_by_another_process(tmp_path, "store.lock"),
        pytest.raises(InputError, match=r"store: another process is preparing this store"),
    ):
        build_store(recipe_at(small, tmp_path / "store"))
    build_store(recipe_at(small, tmp_path / "store"))


def test_changed_raw_files_are_refused(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "raw/modules", tmp_path / "raw")
    recipe = recipe_at(small, tmp_path / "store", **{"data.sources.modules.path": str(tmp_path / "raw")})
    build_store(recipe)
    changed = tmp_path / "raw/a.jsonl"
    changed.write_text(changed.read_text().replace("import", "IMPORT"))  # of the same length
    os.utime(changed, (1000, 1000))  # as tools do that preserve times
    with pytest.raises(InputError, match=r"a.jsonl has changed since the store was made"):
        build_store(recipe)


def eight_files(folder: Path) -> Path:
    texts = python_sources(48)
    for number in range(8):
        path = write_jsonl(folder / f"{number}.jsonl", texts[number * 6 : number * 6 + 6])
        path.write_text(f"{path.read_text()}not json but {path.name}\n")
    return folder


@pytest.mark.parametrize("change", ["changed", "removed", "added"])
def test_unchanged_tasks_are_kept_after_inputs_change(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)
    raw = eight_files(tmp_path / "raw")
    paths = {"data.sources.modules.path": str(raw)}
    interrupt(recipe_at(small, tmp_path / "store", **paths), monkeypatch, 6)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "store/modules/train").glob("0000[0-3].tokens")}
    assert len(shards) == 4
    if change == "changed":
        write_jsonl(raw / "4.jsonl", ["something else"])
    elif change == "removed":
        (raw / "5.jsonl").unlink()
    else:
        write_jsonl(raw / "9.jsonl", python_sources(3))
    build_store(recipe_at(small, tmp_path / "store", **paths))
    build_store(recipe_at(small, tmp_path / "undisturbed", **paths))
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert f"inputs changed during preparation; {5 if change != 'added' else 6} finished" in capsys.readouterr().err


def test_unfinished_work_of_another_recipe_is_refused_and_kept(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)
    interrupt(recipe_at(small, tmp_path / "store"), monkeypatch, 2)
    before = contents(tmp_path / "store")
    with pytest.raises(
        InputError, match=r"store: begun with validation_fraction 0.1, but the recipe has 0.5; choose another store"
    ):
        build_store(recipe_at(small, tmp_path / "store", **{"data.validation_fraction": 0.5}))
    renamed = recipe_at(small, tmp_path / "store")
    renamed.data.sources["other"] = renamed.data.sources.pop("modules")
    with pytest.raises(InputError, match=r"store: begun with sources\.(modules|other)"):
        build_store(renamed)
    assert contents(tmp_path / "store") == before
    build_store(recipe_at(small, tmp_path / "store"))
    assert contents(tmp_path / "store")["manifest.json"]


def test_a_file_changed_during_preparation_is_named(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)
    raw = eight_files(tmp_path / "raw")
    recipe = recipe_at(small, tmp_path / "store", **{"data.sources.modules.path": str(raw)})
    first = (raw / "0.jsonl").read_text()

    def changing(job: Job, stage: str, rank: int) -> None:
        run_task(job, stage, rank)
        (raw / "0.jsonl").write_text(first.replace("import", "IMPORT"))

    with monkeypatch.context() as patch:
        patch.setattr("tinyllama.prepare.executors.run_task", changing)
        with pytest.raises(InputError, match=r"0.jsonl: changed while it was being prepared; run prepare again"):
            build_store(recipe)
    build_store(recipe)
    build_store(recipe_at(small, tmp_path / "undisturbed", **{"data.sources.modules.path": str(raw)}))
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_rejects_of_an_empty_validation_split_are_listed(small: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}} for text in python_sources(9)]
    for name, content in (("train", rows), ("validation", [{"text": None, "meta": rows[0]["meta"]}])):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / "raw" / name / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    source = {"format": "slimpajama", "path": str(tmp_path / "raw"), "weight": 1}
    store = prepared(recipe_at(small, tmp_path / "store", **{"data.sources": {"slim": source}}))
    split = store["slim/validation"]
    assert (split.num_tokens, split.manifest["rows"]) == (0, {"read": 1, "kept": 0, "dropped": {"no text": 1}})
    (reject,) = [json.loads(line) for line in (split.folder / "rejects.jsonl").open()]
    assert reject == {"file": str(tmp_path / "raw/validation/a.jsonl"), "row": 0, "line": 1, "reason": "no text"}
    assert find_corruption(tmp_path / "store") == []
    assert main(["inspect", str(tmp_path / "store")]) == 0


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_store_with_a_damaged_shard_does_not_open(small: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(small / "store", tmp_path / "store")
    shard = tmp_path / "store/modules/train/00000.tokens"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    with pytest.raises(InputError, match=r"00000.tokens: (has \d+ bytes instead of|is missing)"):
        TokenStore.open(tmp_path / "store")
