"""Training in the process of the test, without torchrun and without the training loop."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama.distributed import World
from tinyllama.recipe import Recipe
from tinyllama.train.loop import forward_backward
from tinyllama.train.setup import TrainState, build, initialize_weights, optimizer_step

SINGLE_PROCESS = World(0, 1, torch.device("cpu"))


def load_recipe(small: Path, **overrides: Any) -> Recipe:
    return Recipe.load(small / "recipe.yaml", overrides)


def build_state(recipe: Recipe) -> TrainState:
    """Return a state with initialized weights."""
    state = build(recipe, SINGLE_PROCESS)
    initialize_weights(state)
    return state


def train_step(
    state: TrainState, step: int, sequences: Tensor, document_starts: Tensor | None = None
) -> tuple[float, float]:
    """Do step `step` with a batch, without the guard; return loss and gradient norm."""
    recipe = state.recipe.train
    nats, norm = forward_backward(state, sequences, document_starts=document_starts)
    rate = recipe.learning_rate_at(step)
    optimizer_step(state.optimizers, rate)
    state.model.zero_grad()
    return float(nats) / recipe.batch_tokens, float(norm)
