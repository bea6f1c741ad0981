"""The remedy of each error message of training fits the cause of the error."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.train.single_process import build_state, load_recipe
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tinyllama.distributed import init_distributed
from tinyllama.errors import InputError, RunStoppedError
from tinyllama.runs.checkpoint import load_checkpoint, load_weights
from tinyllama.runs.run_dir import RunDir
from tinyllama.train.guard import Action, Decision
from tinyllama.train.loop import train
from tinyllama.train.resume import roll_back


@pytest.fixture(autouse=True)
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("number", "is_full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False), (errno.EIO, False)]
)
def test_freeing_space_is_the_remedy_only_for_a_full_disk(
    small: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_full: bool
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), "x")

    monkeypatch.setattr(dcp, "save", fail)
    fields = {"train.tokens": 2 * 384, "checkpoint.every_steps": 1, "checkpoint.asynchronous": False}
    with pytest.raises(RunStoppedError, match=re.escape(os.strerror(number))) as error:
        train(load_recipe(small, **fields))
    assert ("free some space" in str(error.value)) == is_full
    assert ("make runs/small/checkpoints writable" in str(error.value)) == (not is_full)


def test_unreadable_checkpoint_is_not_reported_as_another_models(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = RunDir(train(load_recipe(small, **{"train.tokens": 384}))).find_checkpoint()
    state = build_state(load_recipe(small, **{"train.tokens": 384}))

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "x")

    with monkeypatch.context() as broken:
        broken.setattr(FileSystemReader, "read_data", fail)
        with pytest.raises(InputError, match=r"Input/output error.*readable"):
            load_checkpoint(saved, state.model, state.optimizers)
        with pytest.raises(InputError, match=r"Input/output error.*readable"):
            load_weights(saved, state.model)
    other = build_state(load_recipe(small, **{"model.ffn_dim": 64}))
    with pytest.raises(InputError, match=r"recipe.yaml .*ffn.*; .*name"):
        load_checkpoint(saved, other.model, other.optimizers)
    with pytest.raises(InputError, match=r"recipe.yaml .*ffn"):
        load_weights(saved, other.model)


@pytest.mark.parametrize(
    ("change", "is_allowable"), [({"seed": 8}, True), ({"train.batch_sequences": 12, "train.tokens": 768}, False)]
)
def test_changed_recipe_can_be_undone_renamed_and_sometimes_allowed(
    small: Path, change: dict[str, Any], is_allowable: bool
) -> None:
    train(load_recipe(small, **{"train.tokens": 384}))
    with pytest.raises(InputError, match=r"another recipe: .*; undo the change, .*--name") as error:
        train(load_recipe(small, **{"train.tokens": 384} | change))
    assert ("--allow-change" in str(error.value)) == is_allowable
    train(load_recipe(small, **{"train.tokens": 384, "name": "other"} | change))
    if is_allowable:
        train(load_recipe(small, **{"train.tokens": 384} | change), allow_change=True)


@pytest.mark.parametrize("is_spike", [True, False])
def test_higher_spike_threshold_is_a_remedy_only_after_a_spike(small: Path, is_spike: bool) -> None:
    state = build_state(load_recipe(small, **{"guard.max_rollbacks": 0}))
    decision = Decision(Action.ROLL_BACK, "a reason", 2, is_spike)
    with pytest.raises(RunStoppedError, match=r"--allow-change.* guard.max_rollbacks .*learning_rate") as error:
        roll_back(state, None, 20, decision)
    assert ("guard.spike_z_score" in str(error.value)) == is_spike


def test_missing_rank_is_named_with_address_and_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    pattern = r"ranks \[1\] .* within 0.2 s .*MASTER_ADDR.*guard.watchdog_seconds"
    with pytest.raises(RunStoppedError, match=pattern), init_distributed(0.1):
        pass
