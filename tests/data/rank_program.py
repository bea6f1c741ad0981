"""Save one rank's batches from step 1 on: `rank_program.py RECIPE TOKENS RANK FILE`, of three ranks."""

import sys

import torch

from tinyllama.data.batches import batches
from tinyllama.data.store import TokenStore
from tinyllama.recipe import Recipe

path, tokens, rank, file = sys.argv[1:]
recipe = Recipe.load(path, {"train.batch_sequences": 24, "train.tokens": tokens})
torch.save(list(batches(recipe, TokenStore.open(recipe.data.store), 1, int(rank), 3)), file)
