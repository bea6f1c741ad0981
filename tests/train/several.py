"""Trains one recipe after the other in one process, keeping what each step read: starting is paid for once.

Under torchrun or alone, `several.py RECIPE.yaml...`; a rank's rows go to `NAME.RANK.rows`, int64, as they come.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from tinyllama.data.batches import batches as read_batches
from tinyllama.recipe import Recipe
from tinyllama.train import loop


def main(recipes: list[str]) -> None:
    for path in recipes:
        train_keeping_rows(Recipe.load(path))


def train_keeping_rows(recipe: Recipe) -> None:
    kept = Path(f"{recipe.name}.{os.environ.get('RANK', '0')}.rows")

    def batches(*arguments: Any) -> Iterator[Tensor]:
        with kept.open("wb") as file:
            for rows in read_batches(*arguments):
                file.write(rows.numpy().tobytes())
                yield rows

    with mock.patch.object(loop, "batches", batches):
        loop.train(recipe)


if __name__ == "__main__":
    main(sys.argv[1:])
