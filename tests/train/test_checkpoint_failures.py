"""A checkpoint that cannot be written gives the reason and leaves no folder, and the next one is complete."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from tests.train import full_disk_on_one_rank
from tests.train.checkpoints import build_writer, start_checkpoint, state_after_one_step
from tests.train.single_process import load_recipe
from tests.train.torchrun import run_torchrun

from tinyllama.errors import RunStoppedError
from tinyllama.runs import checkpoint
from tinyllama.runs.run_dir import RunDir
from tinyllama.train.loop import train

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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DISK_FULL, "No space left on device"),
        (RuntimeError("on rank 1:\nTraceback\nOSError: [Errno 5] Input/output error"), "Input/output error"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_failed_checkpoint_leaves_no_folder_and_the_next_is_complete(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: str
) -> None:
    state = state_after_one_step(small)
    writer, commits = build_writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(dcp, "async_save", failing_save(error))
        failed = start_checkpoint(writer, state, 1)
        failed.path.mkdir(parents=True)
        (failed.path / "__0_0.distcp").write_bytes(b"incomplete")
        reason = writer.wait()
    assert reason is not None
    assert expected in reason
    assert "\n" not in reason
    assert not failed.path.exists()
    assert not commits
    assert not writer.has_failed
    saved = start_checkpoint(writer, state, 2)
    assert writer.wait() is None
    assert saved.find_damage() == []


def test_a_commit_that_cannot_be_written_leaves_no_folder(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, value: Any) -> None:
        raise DISK_FULL

    monkeypatch.setattr(checkpoint, "write_json", fail)
    writer, commits = build_writer(tmp_path)
    failed = start_checkpoint(writer, state_after_one_step(small), 1)
    assert "No space left" in (writer.wait() or "")
    assert not failed.path.exists()
    assert not commits


@pytest.mark.parametrize(("on_failure", "kept"), [("stop", [2]), ("continue", [6, 8])])
def test_the_recipe_decides_what_a_failed_checkpoint_does(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_failure: str, kept: list[int]
) -> None:
    monkeypatch.chdir(tmp_path)
    save = dcp.async_save

    def fail_at_step_4(*arguments: Any, checkpoint_id: Path, **options: Any) -> Any:
        if checkpoint_id.name == "step-00000004":
            return failing_save(DISK_FULL)()
        return save(*arguments, checkpoint_id=checkpoint_id, **options)

    monkeypatch.setattr(dcp, "async_save", fail_at_step_4)
    recipe = load_recipe(
        small, **{"train.tokens": 8 * 384, "checkpoint.every_steps": 2, "checkpoint.on_failure": on_failure}
    )
    if on_failure == "stop":
        with pytest.raises(RunStoppedError, match=r"step 4 .*No space left"):
            train(recipe)
    else:
        train(recipe)
    run = RunDir.of_recipe(recipe)
    assert [found.step for found in run.checkpoints()] == kept
    failed = [row for row in run.events() if row["event"] == "checkpoint-failed"]
    assert [(row["step"], "No space left" in row["problem"]) for row in failed] == [(4, True)]


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
