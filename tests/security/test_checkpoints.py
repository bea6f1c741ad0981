"""Checkpoints from elsewhere run no code and refer to no file outside their folder."""

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.checkpoints import state_after_one_step, write_checkpoint
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.files import read_json, sha256_of, write_json
from tinyllama.runs.checkpoint import load_checkpoint, load_weights
from tinyllama.runs.run_dir import CheckpointDir
from tinyllama.train.setup import TrainState


class RunsCode:
    """An object whose unpickling writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


def commit_again(folder: Path) -> None:
    """Write the commit that its author would have written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "commit.json"]
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    write_json(folder / "commit.json", {"sha256": hashes})


@pytest.fixture
def trainer(small: Path) -> TrainState:
    return state_after_one_step(small)


@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_meta"])
def test_metadata_that_calls_function_is_refused(trainer: TrainState, tmp_path: Path, place: str) -> None:
    folder, target = write_checkpoint(trainer, tmp_path).path, tmp_path / "run"
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    if place == "whole":
        found = RunsCode(target)
    else:
        setattr(found, place, RunsCode(target))
    path.write_bytes(pickle.dumps(found))
    commit_again(folder)
    with pytest.raises(InputError, match="not the metadata of a checkpoint"):
        load_checkpoint(CheckpointDir(folder), trainer.model, trainer.optimizers)
    with pytest.raises(InputError, match="not the metadata of a checkpoint"):
        load_weights(CheckpointDir(folder), trainer.model)
    assert not target.exists()


def complete(folder: Path, small: Path) -> Path:
    """Give a checkpoint the files that training puts there too."""
    shutil.copy(small / "recipe.yaml", folder / "recipe.yaml")
    shutil.copytree(small / "tokenizer", folder / "tokenizer")
    commit_again(folder)
    return folder


@pytest.mark.parametrize(
    "attack",
    [
        b"\x80\x04}K\x01"
        + b"".join(b"\x94h%c\x86" % number for number in range(40))
        + b"K\x01s",  # a key of 2**40 values
        b"\x80\x04]" + b"".join(b"\x94(h%ch%cl" % (number, number) for number in range(40)),
        b"\x80\x04})" + b"\x85" * 2_000_000 + b"K\x01s",  # the hash of this key overflows the stack
        b"\x80\x04ctorch\nSize\n(" + b"K\x01" * 100 + b"t\x85R2",  # a shape of 100 dimensions, used twice
        b"\x80\x04K\x01"
        + b"".join(
            b"\x94ctorch.distributed.checkpoint.metadata\nChunkStorageMetadata\nh%ch%c\x86R" % (number, number)
            for number in range(40)
        ),
        b"\x80\x04}J\xff\xff\xff\xffK\x01s",  # hash(-1) == hash(-2)
    ],
    ids=["pairs", "lists", "deep", "shape", "instances", "key"],
)
def test_metadata_that_multiplies_values_is_refused(trainer: TrainState, tmp_path: Path, attack: bytes) -> None:
    folder = write_checkpoint(trainer, tmp_path).path
    path = folder / ".metadata"
    path.write_bytes(attack + path.read_bytes())
    commit_again(folder)
    with pytest.raises(InputError, match=r"nested or repeated containers|a key that is neither"):
        load_weights(CheckpointDir(folder), trainer.model)


def test_metadata_that_changes_class_is_refused(
    trainer: TrainState, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(trainer, tmp_path).path
    # Metadata; (None, {"version": "x"}); BUILD; and the class is popped
    attack = b"ctorch.distributed.checkpoint.metadata\nMetadata\nN}U\x07versionU\x01xs\x86b0"
    path = folder / ".metadata"
    path.write_bytes(attack + path.read_bytes())
    assert cli.main(["generate", str(complete(folder, small)), "word"]) == 2
    assert "(sets attributes of a type)" in capsys.readouterr().err
    assert Metadata.version is None


def test_oversized_model_shape_allocates_no_memory(
    trainer: TrainState, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(trainer, tmp_path).path
    write_json(folder / "state.json", read_json(folder / "state.json") | {"vocab_size": 2_000_000_000})
    assert cli.main(["generate", str(complete(folder, small)), "word"]) == 2
    assert "weights do not fit recipe.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret"])
def test_commit_with_file_outside_is_damaged(trainer: TrainState, tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(trainer, tmp_path).path
    hashes = read_json(folder / "commit.json")["sha256"]
    write_json(folder / "commit.json", {"sha256": hashes | {name: "0" * 64}})
    assert any("a file outside its folder" in problem for problem in CheckpointDir(folder).find_damage())


def test_state_file_that_is_pipe_or_device_is_refused(trainer: TrainState, tmp_path: Path) -> None:
    folder = write_checkpoint(trainer, tmp_path).path
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")
    with pytest.raises(InputError, match="not a regular file"):
        CheckpointDir(folder).state()
    (folder / "state.json").unlink()
    (folder / "state.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        CheckpointDir(folder).state()


def test_value_that_calls_function_is_refused(trainer: TrainState, tmp_path: Path) -> None:
    folder, target = write_checkpoint(trainer, tmp_path).path, tmp_path / "run"
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
    with pytest.raises(InputError, match="not plain data"):
        load_checkpoint(CheckpointDir(folder), trainer.model, trainer.optimizers)
    assert not target.exists()


@pytest.mark.parametrize("name", ["../../outside.distcp", "/etc/passwd", "state.json", Path("__0_0.distcp")])
def test_metadata_with_other_file_is_refused(trainer: TrainState, tmp_path: Path, name: Any) -> None:
    folder = write_checkpoint(trainer, tmp_path).path
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    next(iter(found.storage_data.values())).relative_path = name
    path.write_bytes(pickle.dumps(found))
    commit_again(folder)
    with pytest.raises(InputError, match="not a checkpoint's"):
        load_checkpoint(CheckpointDir(folder), trainer.model, trainer.optimizers)


def test_metadata_with_shape_of_other_type_is_refused(trainer: TrainState, tmp_path: Path) -> None:
    folder = write_checkpoint(trainer, tmp_path).path
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    tensor = next(value for value in found.state_dict_metadata.values() if isinstance(value, TensorStorageMetadata))
    tensor.size = ["long text"]  # type: ignore[assignment]
    path.write_bytes(pickle.dumps(found))
    commit_again(folder)
    with pytest.raises(InputError, match="not the metadata of a checkpoint"):
        load_weights(CheckpointDir(folder), trainer.model)


def test_release_with_commit_file_is_no_checkpoint(
    tmp_path: Path, trainer: TrainState, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(trainer, tmp_path).path
    write_json(folder / "release.json", {"name": "x"})
    assert cli.main(["generate", str(folder), "word"]) == 2
    assert "no model" in capsys.readouterr().err
