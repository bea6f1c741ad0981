"""A stranger's checkpoint is data: neither its metadata nor its values run code, or name files outside its folder."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.saving import after_a_step, saved, tensors

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.files import sha256_of, write_json
from tinyllama.train import checkpoint
from tinyllama.train.setup import Trainer


class RunsCode:
    """Pickled, a call of a function that writes a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


def commit_again(folder: Path) -> None:
    """Write the commit that its author would have written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != checkpoint.COMMIT]
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    write_json(folder / checkpoint.COMMIT, {"sha256": hashes})


@pytest.fixture
def trainer(small: Path) -> Trainer:
    return after_a_step(small)


def test_a_checkpoint_of_ours_is_read_with_all_its_tensors(trainer: Trainer, tmp_path: Path) -> None:
    folder = saved(trainer, tmp_path)
    before = {name: value.clone() for name, value in tensors(trainer).items()}
    for value in tensors(trainer).values():
        value.data.zero_()
    checkpoint.load(folder, trainer.model, trainer.optimizers)
    after = tensors(trainer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_meta"])
def test_metadata_that_calls_a_function_is_refused(trainer: Trainer, tmp_path: Path, place: str) -> None:
    folder, target = saved(trainer, tmp_path), tmp_path / "run"
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    if place == "whole":
        found = RunsCode(target)
    else:
        setattr(found, place, RunsCode(target))
    path.write_bytes(pickle.dumps(found))
    commit_again(folder)
    with pytest.raises(InputError, match="not the metadata of a checkpoint"):
        checkpoint.load(folder, trainer.model, trainer.optimizers)
    with pytest.raises(InputError, match="not the metadata of a checkpoint"):
        checkpoint.load_weights(folder, trainer.model)
    assert not target.exists()


def test_a_value_that_calls_a_function_is_refused(trainer: Trainer, tmp_path: Path) -> None:
    folder, target = saved(trainer, tmp_path), tmp_path / "run"
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    info = next(info for index, info in found.storage_data.items() if index.fqn.endswith(".eps"))
    stored = io.BytesIO()
    torch.save(RunsCode(target), stored)
    file = folder / info.relative_path
    info.offset, info.length = file.stat().st_size, len(stored.getvalue())
    file.write_bytes(file.read_bytes() + stored.getvalue())
    path.write_bytes(pickle.dumps(found))
    commit_again(folder)
    with pytest.raises(InputError, match="no plain data"):
        checkpoint.load(folder, trainer.model, trainer.optimizers)
    assert not target.exists()


@pytest.mark.parametrize("name", ["../../outside.distcp", "/etc/passwd", "state.json"])
def test_metadata_that_names_another_file_is_refused(trainer: Trainer, tmp_path: Path, name: str) -> None:
    folder = saved(trainer, tmp_path)
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    next(iter(found.storage_data.values())).relative_path = name
    path.write_bytes(pickle.dumps(found))
    commit_again(folder)
    with pytest.raises(InputError, match="none of a checkpoint's"):
        checkpoint.load(folder, trainer.model, trainer.optimizers)


def test_a_release_that_holds_a_commit_is_no_checkpoint(
    tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(trainer, tmp_path)
    write_json(folder / "release.json", {"name": "x"})
    assert cli.main(["generate", str(folder), "word"]) == 2
    assert "no model here" in capsys.readouterr().err
