"""Program that trains several recipes in one process and records the sequences of each step.

Run `recording_trainer.py RECIPE.yaml...` directly or under torchrun. Each rank writes its sequences, int64, to
`NAME.RANK.rows`. One process for several runs pays for the imports once.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tinyllama.data.batches import Batch
from tinyllama.data.batches import batches as read_batches
from tinyllama.recipe import Recipe
from tinyllama.train import loop


def main(recipes: list[str]) -> None:
    for path in recipes:
        train_and_record(Recipe.load(path))


def train_and_record(recipe: Recipe) -> None:
    path = Path(f"{recipe.name}.{os.environ.get('RANK', '0')}.rows")

    def recorded_batches(*arguments: Any) -> Iterator[Batch]:
        with path.open("wb") as file:
            for batch in read_batches(*arguments):
                file.write(batch.sequences.numpy().tobytes())
                yield batch

    with mock.patch.object(loop, "batches", recorded_batches):
        loop.train(recipe)


if __name__ == "__main__":
    main(sys.argv[1:])
