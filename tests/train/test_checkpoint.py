"""A checkpoint is that of its step, complete or absent, and any number of ranks resumes from it.

A checkpoint that cannot be written or read causes an error with the reason.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.data.reading import batch_of_step
from tests.train import full_disk_on_one_rank
from tests.train.checkpoints import all_tensors, build_writer, start_checkpoint, state_after_one_step, write_checkpoint
from tests.train.launch import read_losses
from tests.train.single_process import build_state, load_recipe, train_step
from tests.train.torchrun import metric_by_step, run_torchrun, train_recipes, write_recipe
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorProperties

from tinyllama.errors import InputError, RunStoppedError
from tinyllama.loading import load_model
from tinyllama.runs import checkpoint
from tinyllama.runs.checkpoint import CheckpointWriter, load_checkpoint, load_weights
from tinyllama.runs.run_dir import CheckpointDir, RunDir
from tinyllama.train.loop import train

pytest_plugins = ["tests.train.fixtures"]


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


def test_damaged_checkpoints_are_skipped_with_an_event_and_the_result_is_the_same(small: Path, work_dir: Path) -> None:
    recipe = load_recipe(small, **{"train.tokens": 9 * 384, "checkpoint.every_steps": 3, "checkpoint.keep": 3})
    run = RunDir(train(recipe))
    losses, weights = read_losses(run.path), load_model(run.path).state_dict()
    run.checkpoint(9).state_path.write_bytes(b"{}")
    next(run.checkpoint(6).path.glob("*.distcp")).unlink()
    with run.events_path.open("ab") as file:
        file.write(b'{"time": 17, "ev')  # an event that a kill cut off
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


def test_a_checkpoint_with_a_damaged_commit_is_skipped(small: Path, work_dir: Path) -> None:
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


def test_a_checkpoint_of_torch_2_15_is_loaded(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_after_one_step(small)
    properties: Any = TensorProperties.__getstate__
    # torch 2.15 appends the strides; other versions write five values.
    monkeypatch.setattr(
        TensorProperties, "__getstate__", lambda tensor: (*properties(tensor)[:5], torch.ones(2, 2).stride())
    )
    saved = write_checkpoint(state, tmp_path)
    other = state_after_one_step(small, seed=2)
    load_checkpoint(saved, other.model, other.optimizers)
    expected = all_tensors(state)
    assert [name for name, value in all_tensors(other).items() if not torch.equal(value, expected[name])] == []


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


# Failures


DISK_FULL = OSError(28, "No space left on device")


def failing_save(error: BaseException) -> Callable[..., "Future[None]"]:
    def save(*_: Any, **__: Any) -> "Future[None]":
        future: Future[None] = Future()
        future.set_exception(error)
        return future

    return save


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_folder_that_cannot_be_created_is_reported(small: Path, tmp_path: Path, asynchronous: bool) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer, commits = build_writer(tmp_path, asynchronous)
    start_checkpoint(writer, state_after_one_step(small), 1)
    reason = writer.wait()
    assert reason is not None
    assert str(tmp_path / "checkpoints") in reason
    assert "\n" not in reason
    assert not commits


def raise_disk_full(*_: Any) -> None:
    raise DISK_FULL


@pytest.mark.parametrize(
    ("module", "name", "function", "reason"),
    [
        (dcp, "async_save", failing_save(DISK_FULL), "No space left on device"),
        (dcp, "async_save", failing_save(RuntimeError("on rank 1:\nOSError: [Errno 5] Input/output")), "Input/output"),
        (dcp, "async_save", failing_save(MemoryError()), "MemoryError"),
        (checkpoint, "write_json", raise_disk_full, "No space left on device"),  # the commit
    ],
)
def test_a_failed_checkpoint_leaves_no_folder_and_the_next_is_complete(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, function: Any, reason: str
) -> None:
    state = state_after_one_step(small)
    writer, commits = build_writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, function)
        failed = start_checkpoint(writer, state, 1)
        failed.path.mkdir(parents=True, exist_ok=True)
        (failed.path / "partial.distcp").write_bytes(b"incomplete")
        found = writer.wait() or ""
    assert reason in found and "\n" not in found
    assert not failed.path.exists()
    assert not commits
    assert not writer.has_failed
    saved = start_checkpoint(writer, state, 2)
    assert writer.wait() is None
    assert saved.find_damage() == []


@pytest.mark.parametrize(
    ("on_failure", "number", "remedy", "kept"),
    [
        ("stop", errno.ENOSPC, "free some space", [2]),
        ("stop", errno.EDQUOT, "free some space", [2]),
        ("stop", errno.EACCES, "make runs/small/checkpoints writable", [2]),
        ("continue", errno.ENOSPC, "", [6, 8]),
    ],
)
def test_the_recipe_decides_what_a_failed_checkpoint_does(
    small: Path,
    work_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_failure: str,
    number: int,
    remedy: str,
    kept: list[int],
) -> None:
    save, problem = dcp.async_save, os.strerror(number)

    def fail_at_step_4(*arguments: Any, checkpoint_id: Path, **options: Any) -> Any:
        if checkpoint_id.name == "step-00000004":
            return failing_save(OSError(number, problem, "x"))()
        return save(*arguments, checkpoint_id=checkpoint_id, **options)

    monkeypatch.setattr(dcp, "async_save", fail_at_step_4)
    recipe = load_recipe(
        small, **{"train.tokens": 8 * 384, "checkpoint.every_steps": 2, "checkpoint.on_failure": on_failure}
    )
    if on_failure == "stop":
        with pytest.raises(RunStoppedError, match=rf"step 4 .*{problem}.*{remedy}"):
            train(recipe)
    else:
        train(recipe)
    run = RunDir.of_recipe(recipe)
    assert [found.step for found in run.checkpoints()] == kept
    failed = [row for row in run.events() if row["event"] == "checkpoint-failed"]
    assert [(row["step"], problem in row["problem"]) for row in failed] == [(4, True)]


def test_unreadable_checkpoint_is_not_reported_as_another_models(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "x")

    state, other = state_after_one_step(small), build_state(load_recipe(small, **{"model.ffn_dim": 64}))
    saved = write_checkpoint(state, tmp_path / "runs/small")
    for model, optimizers, keyword in (
        (state.model, state.optimizers, "readable"),
        (other.model, other.optimizers, "ffn"),
    ):
        with monkeypatch.context() as broken:
            if model is state.model:
                broken.setattr(FileSystemReader, "read_data", fail)
            with pytest.raises(InputError, match=keyword):
                load_checkpoint(saved, model, optimizers)
            with pytest.raises(InputError, match=keyword):
                load_weights(saved, model)


@pytest.mark.slow
def test_a_failure_on_one_rank_fails_the_checkpoint_on_all_and_the_next_is_complete(
    small: Path, tmp_path: Path
) -> None:
    done = run_torchrun(tmp_path, 2, full_disk_on_one_rank.__file__, str(small / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    reasons = {path.name: path.read_text() for path in tmp_path.glob("[01]-[12]")}
    assert sorted(reasons) == ["0-1", "0-2", "1-1", "1-2"]
    assert all("No space left on device" in reasons[name] and "\n" not in reasons[name] for name in ("0-1", "1-1"))
    assert reasons["0-2"] == reasons["1-2"] == "None"
    (saved,) = RunDir(tmp_path / "run").checkpoints()
    assert (saved.step, saved.find_damage()) == (2, [])
