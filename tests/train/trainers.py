"""A trainer in this very process, as the tests want it: alone, its weights in place."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama.recipe import Recipe
from tinyllama.train.distributed import World
from tinyllama.train.loop import forward_backward
from tinyllama.train.optimizer import optimizer_step, zero_grad
from tinyllama.train.schedule import learning_rate
from tinyllama.train.setup import TrainState, build, initialize_weights

ALONE = World(0, 1, torch.device("cpu"))


def recipe_of(small: Path, **overrides: Any) -> Recipe:
    return Recipe.load(small / "recipe.yaml", overrides)


def built(recipe: Recipe) -> TrainState:
    trainer = build(recipe, ALONE)
    initialize_weights(trainer)
    return trainer


def train_step(trainer: TrainState, step: int, rows: Tensor) -> tuple[float, float]:
    """Do step `step`, unguarded, with a batch's rows; its loss and gradient norm."""
    recipe = trainer.recipe.train
    loss, norm = forward_backward(trainer, rows)
    rate = learning_rate(recipe.schedule, recipe.optimizer.learning_rate, step, recipe.steps)
    optimizer_step(trainer.optimizers, rate)
    zero_grad(trainer.optimizers)
    return loss, norm
