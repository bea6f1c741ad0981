"""What a message of training advises is true for the cause that led to it."""

import errno
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.train.single_process import build_state, load_recipe
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tinyllama.errors import InputError, RunStoppedError
from tinyllama.runs import checkpoint
from tinyllama.train import setup
from tinyllama.train.distributed import World, init_distributed
from tinyllama.train.guard import Action, Decision
from tinyllama.train.loop import train
from tinyllama.train.resume import roll_back


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("number", "is_full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False), (errno.EIO, False)]
)
def test_room_is_asked_for_only_where_a_checkpoint_finds_none(
    small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_full: bool
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), "x")

    monkeypatch.setattr(dcp, "save", fails)
    fields = {"train.tokens": 2 * 384, "checkpoint.every_steps": 1, "checkpoint.asynchronous": False}
    with pytest.raises(RunStoppedError, match=re.escape(os.strerror(number))) as error:
        train(load_recipe(small, **fields))
    assert ("free some space" in str(error.value)) == is_full
    assert ("make runs/small/checkpoints writable" in str(error.value)) == (not is_full)


def test_a_checkpoint_that_the_disk_does_not_give_is_not_taken_for_another_models(
    small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(load_recipe(small, **{"train.tokens": 384}))
    (saved,) = checkpoint.list_committed(run)
    trainer = build_state(load_recipe(small, **{"train.tokens": 384}))

    def fails(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "x")

    with monkeypatch.context() as broken:
        broken.setattr(FileSystemReader, "read_data", fails)
        words = r"cannot be read \(.*Input/output error.*\); make its files readable"
        with pytest.raises(InputError, match=words):
            checkpoint.load(saved, trainer.model, trainer.optimizers)
        with pytest.raises(InputError, match=words):
            checkpoint.load_weights(saved, trainer.model)
    other = build_state(load_recipe(small, **{"model.ffn_dim": 64}))
    with pytest.raises(InputError, match=r"does not fit .*recipe.yaml \(.*ffn.*\); .* another name"):
        checkpoint.load(saved, other.model, other.optimizers)
    with pytest.raises(InputError, match=r"does not fit .*recipe.yaml \(.*ffn.*\); put that file back"):
        checkpoint.load_weights(saved, other.model)


@pytest.mark.parametrize(
    ("change", "may_be_allowed"), [({"seed": 8}, True), ({"train.batch_sequences": 12, "train.tokens": 768}, False)]
)
def test_a_changed_recipe_may_be_undone_renamed_and_sometimes_allowed(
    small: Path, folder: Path, change: dict[str, Any], may_be_allowed: bool
) -> None:
    train(load_recipe(small, **{"train.tokens": 384}))
    with pytest.raises(InputError, match=r"made with another recipe: .*; undo the change, .*--name") as error:
        train(load_recipe(small, **{"train.tokens": 384} | change))
    assert ("--allow-change" in str(error.value)) == may_be_allowed
    train(load_recipe(small, **{"train.tokens": 384, "name": "other"} | change))
    if may_be_allowed:
        train(load_recipe(small, **{"train.tokens": 384} | change), allow_change=True)


@pytest.mark.parametrize(("reason", "is_spike"), [("loss 9.1 against a median of 3.0", True), ("loss nan", False)])
def test_a_higher_limit_for_spikes_is_offered_only_after_a_spike(
    small: Path, folder: Path, reason: str, is_spike: bool
) -> None:
    trainer = build_state(load_recipe(small, **{"guard.max_rollbacks": 0}))
    with pytest.raises(RunStoppedError, match=r"--allow-change.* guard.max_rollbacks .*learning_rate") as error:
        roll_back(trainer, None, 20, Decision(Action.ROLL_BACK, reason, 2, is_spike))
    assert ("guard.spike_z_score" in str(error.value)) == is_spike


def test_ranks_that_do_not_come_are_looked_for_or_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    with (
        pytest.raises(
            RunStoppedError, match=r"ranks \[1\] did not join within 0.2 s .*MASTER_ADDR.*guard.watchdog_seconds"
        ),
        init_distributed(0.1),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'torchao'", name="torchao"), "is missing"),
        (ImportError("cannot import name 'x' from 'torch'"), "does not work with torch .*cannot import name 'x'"),
    ],
)
def test_torchao_that_is_there_but_broken_is_not_called_missing(
    small: Path, monkeypatch: pytest.MonkeyPatch, error: ImportError, words: str
) -> None:
    class Refusing:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.startswith("torchao"):
                raise error

    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = build_state(load_recipe(small)).model
    with pytest.raises(InputError, match=rf"train.float8: torchao {words}.*; pip install -U 'tinyllama\[float8\]'"):
        setup.enable_float8(model, World(0, 1, torch.device("cuda")))
