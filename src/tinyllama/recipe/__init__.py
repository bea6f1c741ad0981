"""A run as one YAML file: every field, its default and its check."""

from tinyllama.recipe.data_schema import (
    SLIMPAJAMA_SUBSETS,
    Cleaning,
    Data,
    MixtureStage,
    Slurm,
    Source,
    SpecialTokens,
)
from tinyllama.recipe.loading import bundled_recipes, differences, flatten
from tinyllama.recipe.schema import (
    Checkpoint,
    Guard,
    Model,
    Optimizer,
    Parallel,
    Recipe,
    Release,
    Schedule,
    Track,
    Train,
)

__all__ = [
    "SLIMPAJAMA_SUBSETS",
    "Checkpoint",
    "Cleaning",
    "Data",
    "Guard",
    "MixtureStage",
    "Model",
    "Optimizer",
    "Parallel",
    "Recipe",
    "Release",
    "Schedule",
    "Slurm",
    "Source",
    "SpecialTokens",
    "Track",
    "Train",
    "bundled_recipes",
    "differences",
    "flatten",
]
