"""Checkpoints written in this process without the training loop."""

import time
from pathlib import Path
from typing import Any

import torch
from tests.data.reading import batch_of_step
from tests.train.single_process import build_state, load_recipe, train_step

from tinyllama.runs.checkpoint import CheckpointWriter
from tinyllama.runs.run_dir import CheckpointDir, RunDir
from tinyllama.train.setup import TrainState

Commits = list[tuple[int, float, float]]


def state_after_one_step(small: Path, **overrides: Any) -> TrainState:
    """Return a state whose optimizers have moments."""
    state = build_state(load_recipe(small, **overrides))
    train_step(state, 0, batch_of_step(state.recipe, state.store, 0))
    return state


def all_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Return all that a checkpoint must hold: weights and optimizer state."""
    found = dict(state.model.state_dict())
    for number, optimizer in enumerate(state.optimizers):
        for parameter, moments in optimizer.state_dict()["state"].items():
            found |= {f"{number}.{parameter}.{name}": value for name, value in moments.items()}
    return found


def build_writer(run: Path, asynchronous: bool = True) -> tuple[CheckpointWriter, Commits]:
    commits: Commits = []
    return CheckpointWriter(RunDir(run), asynchronous, lambda *commit: commits.append(commit)), commits


def start_checkpoint(writer: CheckpointWriter, state: TrainState, step: int) -> CheckpointDir:
    writer.start_save(step, state.model, state.optimizers, {"tokens": 0}, time.perf_counter())
    return writer.run.checkpoint(step)


def write_checkpoint(state: TrainState, run: Path, step: int = 1) -> CheckpointDir:
    """Write a complete checkpoint and return it."""
    writer, _ = build_writer(run, asynchronous=False)
    saved = start_checkpoint(writer, state, step)
    assert writer.wait() is None
    return saved
