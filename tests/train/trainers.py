"""A trainer in this very process, as the tests want it: alone, its weights in place."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama.recipe import Recipe
from tinyllama.train.loop import compute_gradients
from tinyllama.train.optimizer import apply_gradients, forget_gradients
from tinyllama.train.parallel import Ranks
from tinyllama.train.schedule import learning_rate
from tinyllama.train.setup import Trainer, build, start

ALONE = Ranks(0, 1, torch.device("cpu"))


def recipe_of(small: Path, **overrides: Any) -> Recipe:
    return Recipe.load(small / "recipe.yaml", overrides)


def built(recipe: Recipe) -> Trainer:
    trainer = build(recipe, ALONE)
    start(trainer)
    return trainer


def train_step(trainer: Trainer, step: int, rows: Tensor) -> tuple[float, float]:
    """Do step `step`, unguarded, with a batch's rows; its loss and gradient norm."""
    recipe = trainer.recipe.train
    loss, norm = compute_gradients(trainer, rows)
    rate = learning_rate(recipe.schedule, recipe.optimizer.learning_rate, step, recipe.steps)
    apply_gradients(trainer.optimizers, rate)
    forget_gradients(trainer.optimizers)
    return loss, norm
