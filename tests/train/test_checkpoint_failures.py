"""A checkpoint that cannot be written says why, leaves no folder, and the next one is whole; on all ranks alike."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from tests.train.checkpoints import build_writer, start_checkpoint, state_after_one_step
from tests.train.single_process import load_recipe
from tests.train.torchrun import run_torchrun

from tinyllama.errors import RunStoppedError
from tinyllama.runs import checkpoint
from tinyllama.runs.run_dir import RunDir
from tinyllama.train.loop import train


def failing(error: BaseException) -> Callable[..., "Future[None]"]:
    def save(*_: Any, **__: Any) -> "Future[None]":
        future: Future[None] = Future()
        future.set_exception(error)
        return future

    return save


@pytest.mark.parametrize("asynchronous", [True, False])
def test_where_no_folder_can_be_made_settling_says_why(small: Path, tmp_path: Path, asynchronous: bool) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    saver, commits = build_writer(tmp_path, asynchronous)
    start_checkpoint(saver, state_after_one_step(small), 1)
    reason = saver.settle()
    assert reason is not None
    assert str(tmp_path / "checkpoints") in reason
    assert "\n" not in reason
    assert not commits


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("on rank 1:\nTraceback\nOSError: [Errno 5] Input/output error"), "Input/output error"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_checkpoint_that_fails_leaves_its_reason_and_no_folder_and_the_next_is_whole(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, wanted: str
) -> None:
    trainer = state_after_one_step(small)
    saver, commits = build_writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(dcp, "async_save", failing(error))
        folder = start_checkpoint(saver, trainer, 1)
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(b"half")
        reason = saver.settle()
    assert reason is not None
    assert wanted in reason
    assert "\n" not in reason
    assert not folder.exists()
    assert not commits
    assert not saver.has_failed
    folder = start_checkpoint(saver, trainer, 2)
    assert saver.settle() is None
    assert checkpoint.find_damage(folder) == []


def test_a_commit_that_cannot_be_written_leaves_no_folder(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    saver, commits = build_writer(tmp_path)
    folder = start_checkpoint(saver, state_after_one_step(small), 1)
    assert "No space left" in (saver.settle() or "")
    assert not folder.exists()
    assert not commits


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_run_whose_checkpoint_fails_stops_or_goes_on_as_the_recipe_says(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_failure: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save = dcp.async_save

    def full_at_step_4(*arguments: Any, checkpoint_id: Path, **options: Any) -> Any:
        if checkpoint_id.name == "step-00000004":
            return failing(OSError(28, "No space left on device"))()
        return save(*arguments, checkpoint_id=checkpoint_id, **options)

    monkeypatch.setattr(dcp, "async_save", full_at_step_4)
    fields = {"train.tokens": 8 * 384, "checkpoint.every_steps": 2, "checkpoint.on_failure": on_failure}
    run = Path("runs/small")
    if on_failure == "stop":
        with pytest.raises(RunStoppedError, match=r"checkpoint of step 4 cannot be written.*No space left"):
            train(load_recipe(small, **fields))
        assert [checkpoint.step_of(folder) for folder in checkpoint.list_committed(run)] == [2]
    else:
        train(load_recipe(small, **fields))
        assert [checkpoint.step_of(folder) for folder in checkpoint.list_committed(run)] == [6, 8]
    failed = [row for row in RunDir(run).events() if row["event"] == "checkpoint-failed"]
    assert [(row["step"], "No space left" in row["problem"]) for row in failed] == [(4, True)]


# Of two ranks, the second cannot write its first checkpoint; what each is told of that one and of the next.
FULL_DISK = """
import sys
import time
from pathlib import Path
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from tinyllama.recipe import Recipe
from tinyllama.runs.checkpoint import CheckpointWriter
from tinyllama.train.distributed import init_distributed
from tinyllama.train.setup import build, initialize_weights

def full(*_):
    raise OSError(28, "No space left on device")

write = FileSystemWriter.write_data
with init_distributed(60) as ranks:
    trainer = build(Recipe.load(sys.argv[1]), ranks)
    initialize_weights(trainer)
    saver = CheckpointWriter(Path("run"), True, lambda *_: None)
    for step in (1, 2):
        FileSystemWriter.write_data = full if (ranks.rank, step) == (1, 1) else write
        saver.begin(step, trainer.model, trainer.optimizers, {}, time.perf_counter())
        Path(f"{ranks.rank}-{step}").write_text(str(saver.settle()))
"""


@pytest.mark.slow
def test_a_checkpoint_that_fails_on_one_rank_fails_on_all_and_the_next_is_whole(small: Path, tmp_path: Path) -> None:
    (tmp_path / "full.py").write_text(FULL_DISK)
    done = run_torchrun(tmp_path, 2, "full.py", str(small / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    told = {path.name: path.read_text() for path in tmp_path.glob("[01]-[12]")}
    assert sorted(told) == ["0-1", "0-2", "1-1", "1-2"]
    assert all("No space left on device" in told[name] and "\n" not in told[name] for name in ("0-1", "1-1"))
    assert told["0-2"] == told["1-2"] == "None"
    assert [folder.name for folder in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    assert checkpoint.find_damage(checkpoint.list_committed(tmp_path / "run")[0]) == []
