"""Checkpoints: a folder a step, whole or not there.

Writes `RUN/checkpoints/step-00000100/` with torch's distributed checkpoint (DCP), `state.json`, and last of all
`commit.json` with the SHA-256 of every file. What lacks a commit, or does not match it, is never resumed from.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tinyllama.errors import InputError
from tinyllama.files import read_json, sha256_of, sync_directory, write_json

COMMIT = "commit.json"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name: they sort by it, not by their names."""
    return int(folder.name.removeprefix("step-"))


def committed(run: Path) -> list[Path]:
    """Folders of all committed checkpoints, oldest first."""
    return sorted((path.parent for path in (run / "checkpoints").glob(f"step-[0-9]*/{COMMIT}")), key=step_of)


def problems(folder: Path) -> list[str]:
    """What does not match the commit, a line each; empty for a whole checkpoint."""
    found = []
    for name, promised in read_json(folder / COMMIT)["sha256"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif sha256_of(path) != promised:
            found.append(f"{path} does not match its hash")
    return found


def save(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write a checkpoint and commit it; `state` is JSON: what else the run must know to go on."""
    folder = checkpoint_folder(run, step)
    if _is_first_rank():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _barrier()
    weights, moments = get_state_dict(model, optimizer)
    with _quiet_alone():
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder, no_dist=_is_alone())
    if _is_first_rank():
        write_json(folder / "state.json", {"step": step, **state})
        _commit(folder)
    _barrier()
    return folder


def _commit(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(folder)
    write_json(folder / COMMIT, {"sha256": {path.name: sha256_of(path) for path in files}})
    sync_directory(folder.parent)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's weights and optimiser state in place, on any number of ranks; return its `state`."""
    weights, moments = get_state_dict(model, optimizer)
    with _quiet_alone():
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder, no_dist=_is_alone())
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    state: dict[str, Any] = read_json(folder / "state.json")
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights alone in place, in one process. Raises InputError where a file is damaged."""
    if damage := problems(folder):
        raise InputError(f"{damage[0]}; take another checkpoint")
    weights = model.state_dict()
    with _quiet_alone():
        dcp.load({"model": weights}, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(weights)


def retain(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` committed checkpoints, and what an interrupted save left behind."""
    newest = committed(run)[-keep:]
    for folder in (run / "checkpoints").glob("step-*"):
        if folder not in newest:
            delete(folder)


def delete(folder: Path) -> None:
    """Delete a checkpoint, its commit first, so that one half deleted is not taken for whole."""
    (folder / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _is_alone() -> bool:
    return not dist.is_initialized()


def _is_first_rank() -> bool:
    return _is_alone() or dist.get_rank() == 0


def _barrier() -> None:
    if not _is_alone():
        dist.barrier()


@contextmanager
def _quiet_alone() -> Iterator[None]:
    """Keep DCP from warning, at each call, that there is one process: it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
