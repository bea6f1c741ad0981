"""Trains a recipe in Python, as docs/gpu.md shows, and prints the imported packages: `minimal_program.py RECIPE`."""

import sys

from tinyllama import Recipe, train_model

train_model(Recipe.load(sys.argv[1]))
print("imported:", *{name.partition(".")[0] for name in sys.modules})
