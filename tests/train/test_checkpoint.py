"""A checkpoint is its step's, whole or not there, and any number of ranks goes on from it."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.train.checkpoints import all_tensors, build_writer, start_checkpoint, state_after_one_step, write_checkpoint
from tests.train.launch import read_losses
from tests.train.single_process import build_state, load_recipe, train_step
from tests.train.torchrun import metric_by_step, train_recipes, write_recipe
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tinyllama.data.batches import batch_of_step
from tinyllama.files import read_json, write_json
from tinyllama.loading import load_model
from tinyllama.runs import checkpoint
from tinyllama.runs.checkpoint import CheckpointWriter
from tinyllama.runs.run_dir import RunDir
from tinyllama.train.loop import train


@pytest.fixture
def disk_waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing of a checkpoint is written until this is set."""
    go, write = threading.Event(), FileSystemWriter.write_data

    def waiting(*arguments: Any) -> Any:
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", waiting)
    return go


def test_an_asynchronous_checkpoint_holds_its_steps_tensors_although_training_changes_them_at_once(
    small: Path, tmp_path: Path, disk_waits: threading.Event
) -> None:
    trainer = state_after_one_step(small)
    wanted = {name: value.clone() for name, value in all_tensors(trainer).items()}
    saver, commits = build_writer(tmp_path)
    folder = start_checkpoint(saver, trainer, 1)
    with torch.no_grad():
        for value in all_tensors(trainer).values():
            value.add_(1)
    assert not checkpoint.list_committed(tmp_path)
    disk_waits.set()
    assert saver.settle() is None
    other = state_after_one_step(small, seed=2)
    checkpoint.load(folder, other.model, other.optimizers)
    assert checkpoint.read_state(folder) == {"step": 1, "tokens": 0}
    found = all_tensors(other)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    ((step, seconds, stood_still),) = commits
    assert step == 1
    assert 0 <= stood_still < seconds  # training went on while the disk waited


def test_a_second_checkpoint_cannot_begin_before_the_first_is_settled(
    small: Path, tmp_path: Path, disk_waits: threading.Event
) -> None:
    trainer = state_after_one_step(small)
    saver, _ = build_writer(tmp_path)
    start_checkpoint(saver, trainer, 1)
    with pytest.raises(AssertionError, match="settle the checkpoint before"):
        start_checkpoint(saver, trainer, 2)
    disk_waits.set()
    assert saver.settle() is None
    start_checkpoint(saver, trainer, 2)
    assert saver.settle() is None
    assert [folder.name for folder in checkpoint.list_committed(tmp_path)] == ["step-00000001", "step-00000002"]


def test_checkpoints_at_every_step_never_overlap_and_none_is_left_out(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    happened: list[tuple[str, str]] = []
    awaited = threading.Event()
    save, commit, settle = dcp.async_save, checkpoint._commit, CheckpointWriter.settle

    def noted_save(*arguments: Any, checkpoint_id: Path, **options: Any) -> Any:
        happened.append(("begin", checkpoint_id.name))
        return save(*arguments, checkpoint_id=checkpoint_id, **options)

    def noted_settle(saver: CheckpointWriter, alive: Callable[[], None]) -> str | None:
        if saver.pending:
            awaited.set()
        return settle(saver, alive)

    def late_commit(folder: Path) -> None:
        while happened[-1] == ("begin", folder.name) and not awaited.wait(0.01):
            pass  # until training waits for this one, or begins another
        awaited.clear()
        commit(folder)
        happened.append(("commit", folder.name))

    monkeypatch.setattr(dcp, "async_save", noted_save)
    monkeypatch.setattr(checkpoint, "_commit", late_commit)
    monkeypatch.setattr(CheckpointWriter, "settle", noted_settle)
    run = train(load_recipe(small, **{"train.tokens": 6 * 384, "checkpoint.every_steps": 1}))
    steps = [f"step-{step:08d}" for step in range(1, 7)]
    assert happened == [(what, step) for step in steps for what in ("begin", "commit")]
    rows = [row for row in RunDir(run).events() if row["event"] == "checkpoint"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= row["stall_seconds"] < row["seconds"] for row in rows)


@pytest.mark.slow
def test_milestones_are_saved_at_the_step_that_reaches_them_and_outlive_the_newest(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    at = [4 * 384 + 1, 7 * 384, 1_000_000]  # just after step 4, exactly at step 7, after the end
    fields = {"train.tokens": 16 * 384, "checkpoint.every_steps": 3, "checkpoint.keep": 2}
    run = train(load_recipe(small, **fields, **{"release.at_tokens": at, "release.tasks": []}))
    saved_at = [row["step"] for row in RunDir(run).events() if row["event"] == "checkpoint"]
    assert saved_at == [3, 5, 6, 7, 9, 12, 15, 16]
    assert [checkpoint.step_of(folder) for folder in checkpoint.list_committed(run)] == [5, 7, 15, 16]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (5, 7, 15, 16)
    ]


def test_the_commit_is_written_last_over_all_files(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    before: list[list[str]] = []

    def noted(path: Path, value: Any) -> None:
        written.append(path.name)
        before.append(sorted(other.name for other in path.parent.iterdir()))
        assert not checkpoint.list_committed(tmp_path)
        write_json(path, value)

    monkeypatch.setattr(checkpoint, "write_json", noted)
    folder = write_checkpoint(state_after_one_step(small), tmp_path)
    assert written == ["state.json", "commit.json"]
    assert sorted(read_json(folder / "commit.json")["sha256"]) == before[1]
    assert {"state.json", ".metadata"} < set(before[1])
    assert checkpoint.list_committed(tmp_path) == [folder]
    (folder / "commit.json").unlink()
    assert checkpoint.list_committed(tmp_path) == []


def test_a_flipped_bit_and_a_missing_file_are_named(small: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(state_after_one_step(small), tmp_path)
    assert checkpoint.find_damage(folder) == []
    for path in sorted(folder.iterdir()):
        if path.name == "commit.json":
            continue
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            assert checkpoint.find_damage(folder) == [f"{path} does not match its hash"]
        path.unlink()
        assert checkpoint.find_damage(folder) == [f"{path} is missing"]
        path.write_bytes(content)
    assert checkpoint.find_damage(folder) == []


def test_what_is_damaged_is_passed_over_with_an_event_and_the_run_ends_the_same(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(small, **{"train.tokens": 9 * 384, "checkpoint.every_steps": 3, "checkpoint.keep": 3})
    run = train(recipe)
    wanted, weights = read_losses(run), load_model(run).state_dict()
    newest, before, _ = (checkpoint.checkpoint_folder(run, step) for step in (9, 6, 3))
    (newest / "state.json").write_bytes(b"{}")
    next(before.glob("*.distcp")).unlink()
    train(recipe)
    rows = list(RunDir(run).events())
    assert [(row["event"], row["step"]) for row in rows if row["event"] in ("checkpoint-damaged", "resume")] == [
        ("checkpoint-damaged", 9),
        ("checkpoint-damaged", 6),
        ("resume", 3),
    ]
    assert "state.json does not match" in next(row["problem"] for row in rows if row["step"] == 9 and "problem" in row)
    assert read_losses(run) == wanted
    assert checkpoint.list_committed(run)[-1] == newest and checkpoint.find_damage(newest) == []
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_model(run).state_dict().items())


def test_a_checkpoint_whose_commit_is_damaged_is_passed_over(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(small, **{"train.tokens": 6 * 384, "checkpoint.every_steps": 2, "checkpoint.keep": 3})
    run = train(recipe)
    commit = checkpoint.checkpoint_folder(run, 6) / "commit.json"
    for content in (b"", b"{}", b"[1]", b'{"sha256": 3}'):
        commit.write_bytes(content)
        assert checkpoint.find_damage(commit.parent) == [f"{commit} is not a whole commit"]
    (checkpoint.checkpoint_folder(run, 2) / "state.json").write_bytes(b"{")  # looked at where milestones are
    train(recipe)
    events = [(row["event"], row["step"]) for row in RunDir(run).events()]
    assert ("checkpoint-damaged", 6) in events and ("resume", 4) in events
    assert [row["step"] for row in RunDir(run).metrics()] == [1, 2, 3, 4, 5, 6]


def test_saving_changes_nothing_also_before_the_first_update(small: Path, tmp_path: Path) -> None:
    saved_first, never = build_state(load_recipe(small)), build_state(load_recipe(small))
    saver, _ = build_writer(tmp_path)
    start_checkpoint(saver, saved_first, 1)
    assert saver.settle() is None
    resumed = build_state(load_recipe(small))
    checkpoint.load(checkpoint.checkpoint_folder(tmp_path, 1), resumed.model, resumed.optimizers)
    rows = batch_of_step(load_recipe(small), saved_first.store, 0)
    for trainer in (saved_first, never, resumed):
        train_step(trainer, 5, rows)
    wanted = all_tensors(never)
    for trainer in (saved_first, resumed):
        assert [name for name, value in all_tensors(trainer).items() if not torch.equal(value, wanted[name])] == []


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_changed_constant_of_the_optimizer_is_the_one_that_counts(small: Path, tmp_path: Path, name: str) -> None:
    trainer = state_after_one_step(small, **{"train.optimizer.name": name})
    folder = write_checkpoint(trainer, tmp_path)
    changed = build_state(load_recipe(small, **{"train.optimizer.name": name, "train.optimizer.weight_decay": 0.7}))
    checkpoint.load(folder, changed.model, changed.optimizers)
    assert {group["weight_decay"] for optimizer in changed.optimizers for group in optimizer.param_groups} <= {0.0, 0.7}


@pytest.fixture(scope="module")
def saved_by_four(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `alone`, 8 steps by one rank, and `four`, which four ranks have left at a checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("saved")
    train_recipes(folder, 1, [written(folder, small, "alone")])
    train_recipes(folder, 4, [written(folder, small, "four")])
    shutil.rmtree(folder / "runs/four/checkpoints/step-00000008")
    return folder


def written(folder: Path, small: Path, name: str) -> str:
    fields = {"train.tokens": 8 * 12 * 64, "train.batch_sequences": 12, "train.micro_batch_sequences": 12}
    also = {"checkpoint.every_steps": 4, "train.validation_sequences": 4}
    return write_recipe(folder, small, name, **fields, **also)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_four_ranks_saved_any_number_goes_on_from(small: Path, saved_by_four: Path, ranks: int) -> None:
    name = f"by-{ranks}"
    shutil.copytree(saved_by_four / "runs/four", saved_by_four / "runs" / name)
    train_recipes(saved_by_four, ranks, [written(saved_by_four, small, name)])
    run = saved_by_four / "runs" / name
    resumed = [(row["step"], row["ranks"]) for row in RunDir(run).events() if row["event"] == "resume"]
    assert resumed == [(4, ranks)]
    assert metric_by_step(saved_by_four, name) == pytest.approx(metric_by_step(saved_by_four, "alone"), rel=1e-5)
    states = [checkpoint.read_state(checkpoint.checkpoint_folder(run, step)) for step in (4, 8)]
    assert [state["ranks"] for state in states] == [4, ranks]
