"""Checkpoints of a trainer in this very process, saved without the training loop."""

import time
from pathlib import Path
from typing import Any

import torch
from tests.train.trainers import built, recipe_of, train_step

from tinyllama.data.batches import batch_of_step
from tinyllama.runs import checkpoint
from tinyllama.runs.checkpoint import CheckpointWriter
from tinyllama.train.setup import TrainState

Commits = list[tuple[int, float, float]]


def after_a_step(small: Path, **overrides: Any) -> TrainState:
    """A trainer whose optimiser has something to remember."""
    trainer = built(recipe_of(small, **overrides))
    train_step(trainer, 0, batch_of_step(trainer.recipe, trainer.store, 0))
    return trainer


def tensors(trainer: TrainState) -> dict[str, torch.Tensor]:
    """All that a checkpoint must hold: weights and the optimisers' state."""
    found = dict(trainer.model.state_dict())
    for number, optimizer in enumerate(trainer.optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            found |= {f"{number}.{parameter}.{name}": value for name, value in state.items()}
    return found


def saver_of(run: Path, asynchronous: bool = True) -> tuple[CheckpointWriter, Commits]:
    commits: Commits = []
    return CheckpointWriter(run, asynchronous, lambda *commit: commits.append(commit)), commits


def begin(saver: CheckpointWriter, trainer: TrainState, step: int) -> Path:
    saver.begin(step, trainer.model, trainer.optimizers, {"tokens": 0}, time.perf_counter())
    return checkpoint.checkpoint_folder(saver.run, step)


def saved(trainer: TrainState, run: Path, step: int = 1) -> Path:
    """A whole checkpoint of a trainer."""
    saver, _ = saver_of(run, asynchronous=False)
    folder = begin(saver, trainer, step)
    assert saver.settle() is None
    return folder
