"""A checkpoint is that of its step, complete or absent, and any number of ranks resumes from it."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.data.reading import batch_of_step
from tests.train.checkpoints import all_tensors, build_writer, start_checkpoint, state_after_one_step, write_checkpoint
from tests.train.launch import read_losses
from tests.train.single_process import build_state, load_recipe, train_step
from tests.train.torchrun import metric_by_step, train_recipes, write_recipe
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tinyllama.files import read_json, write_json
from tinyllama.loading import load_model
from tinyllama.runs import checkpoint
from tinyllama.runs.checkpoint import CheckpointWriter, load_checkpoint
from tinyllama.runs.run_dir import CheckpointDir, RunDir
from tinyllama.train.loop import train


def steps(run: Path) -> list[int]:
    return [found.step for found in RunDir(run).checkpoints()]


@pytest.fixture
def disk_waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event until which nothing of a checkpoint is written."""
    go, write = threading.Event(), FileSystemWriter.write_data

    def wait_and_write(*arguments: Any) -> Any:
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", wait_and_write)
    return go


def test_an_asynchronous_checkpoint_has_the_tensors_of_its_step(
    small: Path, tmp_path: Path, disk_waits: threading.Event
) -> None:
    state = state_after_one_step(small)
    expected = {name: value.clone() for name, value in all_tensors(state).items()}
    writer, commits = build_writer(tmp_path)
    saved = start_checkpoint(writer, state, 1)
    with torch.no_grad():
        for value in all_tensors(state).values():
            value.add_(1)
    assert not steps(tmp_path)
    disk_waits.set()
    assert writer.wait() is None
    other = state_after_one_step(small, seed=2)
    load_checkpoint(saved, other.model, other.optimizers)
    assert saved.state() == {"step": 1, "tokens": 0}
    found = all_tensors(other)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    ((step, seconds, stall_seconds),) = commits
    assert step == 1
    assert 0 <= stall_seconds < seconds  # training continued while the disk waited


def test_a_checkpoint_starts_only_after_the_previous_one(
    small: Path, tmp_path: Path, disk_waits: threading.Event
) -> None:
    state = state_after_one_step(small)
    writer, _ = build_writer(tmp_path)
    start_checkpoint(writer, state, 1)
    with pytest.raises(AssertionError, match="wait for the previous checkpoint"):
        start_checkpoint(writer, state, 2)
    disk_waits.set()
    assert writer.wait() is None
    start_checkpoint(writer, state, 2)
    assert writer.wait() is None
    assert steps(tmp_path) == [1, 2]


def test_checkpoints_at_every_step_are_complete_and_never_overlap(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    actions: list[tuple[str, str]] = []
    is_awaited = threading.Event()
    save, commit, wait = dcp.async_save, checkpoint._commit, CheckpointWriter.wait

    def recorded_save(*arguments: Any, checkpoint_id: Path, **options: Any) -> Any:
        actions.append(("save", checkpoint_id.name))
        return save(*arguments, checkpoint_id=checkpoint_id, **options)

    def recorded_wait(writer: CheckpointWriter, alive: Callable[[], None]) -> str | None:
        if writer.pending:
            is_awaited.set()
        return wait(writer, alive)

    def late_commit(saved: CheckpointDir) -> None:
        while actions[-1] == ("save", saved.name) and not is_awaited.wait(0.01):
            pass  # until training waits for this checkpoint, or starts another
        is_awaited.clear()
        commit(saved)
        actions.append(("commit", saved.name))

    monkeypatch.setattr(dcp, "async_save", recorded_save)
    monkeypatch.setattr(checkpoint, "_commit", late_commit)
    monkeypatch.setattr(CheckpointWriter, "wait", recorded_wait)
    run = train(load_recipe(small, **{"train.tokens": 6 * 384, "checkpoint.every_steps": 1}))
    names = [f"step-{step:08d}" for step in range(1, 7)]
    assert actions == [(action, name) for name in names for action in ("save", "commit")]
    rows = [row for row in RunDir(run).events() if row["event"] == "checkpoint"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= row["stall_seconds"] < row["seconds"] for row in rows)


@pytest.mark.slow
def test_milestones_are_saved_when_reached_and_never_pruned(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    at_tokens = [4 * 384 + 1, 7 * 384, 1_000_000]  # just after step 4, exactly at step 7, after the end
    fields = {"train.tokens": 16 * 384, "checkpoint.every_steps": 3, "checkpoint.keep": 2}
    run = train(load_recipe(small, **fields, **{"release.at_tokens": at_tokens, "release.tasks": []}))
    saved_at = [row["step"] for row in RunDir(run).events() if row["event"] == "checkpoint"]
    assert saved_at == [3, 5, 6, 7, 9, 12, 15, 16]
    assert steps(run) == [5, 7, 15, 16]
    assert len([*RunDir(run).checkpoints_dir.iterdir()]) == 4


def test_the_commit_is_written_last_over_all_files(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    existing: list[list[str]] = []

    def recorded_write(path: Path, value: Any) -> None:
        written.append(path.name)
        existing.append(sorted(other.name for other in path.parent.iterdir()))
        assert not steps(tmp_path)
        write_json(path, value)

    monkeypatch.setattr(checkpoint, "write_json", recorded_write)
    saved = write_checkpoint(state_after_one_step(small), tmp_path)
    assert written == ["state.json", "commit.json"]
    assert sorted(read_json(saved.commit_path)["sha256"]) == existing[1]
    assert {"state.json", ".metadata"} < set(existing[1])
    assert steps(tmp_path) == [1]
    saved.commit_path.unlink()
    assert steps(tmp_path) == []


def test_flipped_bits_and_missing_files_are_found(small: Path, tmp_path: Path) -> None:
    saved = write_checkpoint(state_after_one_step(small), tmp_path)
    assert saved.find_damage() == []
    for path in sorted(saved.path.iterdir()):
        if path == saved.commit_path:
            continue
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            assert saved.find_damage() == [f"{path} does not match its hash"]
        path.unlink()
        assert saved.find_damage() == [f"{path} is missing"]
        path.write_bytes(content)
    assert saved.find_damage() == []


def test_damaged_checkpoints_are_skipped_with_an_event_and_the_result_is_the_same(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(small, **{"train.tokens": 9 * 384, "checkpoint.every_steps": 3, "checkpoint.keep": 3})
    run = RunDir(train(recipe))
    losses, weights = read_losses(run.path), load_model(run.path).state_dict()
    run.checkpoint(9).state_path.write_bytes(b"{}")
    next(run.checkpoint(6).path.glob("*.distcp")).unlink()
    train(recipe)
    events = [event for event in run.events() if event["event"] in ("checkpoint-damaged", "resume")]
    assert [(event["event"], event["step"]) for event in events] == [
        ("checkpoint-damaged", 9),
        ("checkpoint-damaged", 6),
        ("resume", 3),
    ]
    assert "state.json" in events[0]["problem"]
    assert read_losses(run.path) == losses
    assert run.find_checkpoint() == run.checkpoint(9)
    assert run.checkpoint(9).find_damage() == []
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_model(run.path).state_dict().items())


def test_a_checkpoint_with_a_damaged_commit_is_skipped(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(small, **{"train.tokens": 6 * 384, "checkpoint.every_steps": 2, "checkpoint.keep": 3})
    run = RunDir(train(recipe))
    newest = run.checkpoint(6)
    for content in (b"", b"{}", b"[1]", b'{"sha256": 3}'):
        newest.commit_path.write_bytes(content)
        assert newest.find_damage() == [f"{newest.commit_path} is not a complete commit"]
    run.checkpoint(2).state_path.write_bytes(b"{")  # read to find milestones
    train(recipe)
    events = [(row["event"], row["step"]) for row in run.events()]
    assert {("checkpoint-damaged", 6), ("resume", 4)} <= {*events}
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_saving_before_the_first_update_changes_nothing(small: Path, tmp_path: Path) -> None:
    saving, never_saving, resumed = (build_state(load_recipe(small)) for _ in range(3))
    writer, _ = build_writer(tmp_path)
    saved = start_checkpoint(writer, saving, 1)
    assert writer.wait() is None
    load_checkpoint(saved, resumed.model, resumed.optimizers)
    rows = batch_of_step(load_recipe(small), saving.store, 0)
    for state in (saving, never_saving, resumed):
        train_step(state, 5, rows)
    expected = all_tensors(never_saving)
    for state in (saving, resumed):
        assert [name for name, value in all_tensors(state).items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_changed_hyperparameters_override_the_saved_ones(small: Path, tmp_path: Path, name: str) -> None:
    saved = write_checkpoint(state_after_one_step(small, **{"train.optimizer.name": name}), tmp_path)
    changed = build_state(load_recipe(small, **{"train.optimizer.name": name, "train.optimizer.weight_decay": 0.7}))
    load_checkpoint(saved, changed.model, changed.optimizers)
    assert {group["weight_decay"] for optimizer in changed.optimizers for group in optimizer.param_groups} <= {0.0, 0.7}


@pytest.fixture(scope="module")
def saved_by_four(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `single`, 8 steps by one rank, and `four`, stopped by four ranks at step 4."""
    folder = tmp_path_factory.mktemp("saved")
    train_recipes(folder, 1, [write_small_recipe(folder, small, "single")])
    train_recipes(folder, 4, [write_small_recipe(folder, small, "four")])
    shutil.rmtree(RunDir(folder / "runs/four").checkpoint(8).path)
    return folder


def write_small_recipe(folder: Path, small: Path, name: str) -> str:
    fields = {"train.tokens": 8 * 12 * 64, "train.batch_sequences": 12, "train.micro_batch_sequences": 12}
    return write_recipe(folder, small, name, **fields, **{"checkpoint.every_steps": 4, "train.validation_sequences": 4})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_of_four_ranks_resumes_on_any_number(small: Path, saved_by_four: Path, ranks: int) -> None:
    name = f"by-{ranks}"
    shutil.copytree(saved_by_four / "runs/four", saved_by_four / "runs" / name)
    train_recipes(saved_by_four, ranks, [write_small_recipe(saved_by_four, small, name)])
    run = RunDir(saved_by_four / "runs" / name)
    assert [(row["step"], row["ranks"]) for row in run.events() if row["event"] == "resume"] == [(4, ranks)]
    assert metric_by_step(saved_by_four, name) == pytest.approx(metric_by_step(saved_by_four, "single"), rel=1e-5)
    assert [found.state()["ranks"] for found in run.checkpoints()] == [4, ranks]
