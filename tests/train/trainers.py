"""A trainer in this very process, as the tests want it: alone, its weights in place."""

import torch

from tinyllama.recipe import Recipe
from tinyllama.train.parallel import Ranks
from tinyllama.train.setup import Trainer, build, start

ALONE = Ranks(0, 1, torch.device("cpu"))


def built(recipe: Recipe) -> Trainer:
    trainer = build(recipe, ALONE)
    start(trainer)
    return trainer
