"""What docs/continue.md shows of a run, held against its recipe and the README's demo, whose weights it goes on from.

The run itself needs the demo's eight minutes first, so it is not done again: counts and rates follow from the recipe,
and losses must be near the demo's last.
"""

import re
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT, blocks_of

from tinyllama.recipe import Recipe
from tinyllama.train.schedule import learning_rate

BLOCKS = blocks_of(ROOT / "docs/continue.md")
ROWS = [line.split() for block in BLOCKS if block.language == "text" for line in block.body.splitlines()]
"""Step, tokens, learning rate, loss and, in some, validation's bits per byte."""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (text,) = [block.body for block in BLOCKS if block.title == "continued.yaml"]
    (tmp_path / "continued.yaml").write_text(text)
    return Recipe.load(tmp_path / "continued.yaml")


def test_steps_tokens_and_rates_are_those_that_the_recipe_gives(recipe: Recipe) -> None:
    train = recipe.train
    assert [row[0] for row in ROWS] == ["1", "2", "10", "15", "20"]
    for row in ROWS:
        step, tokens, rate = row[:3]
        expected = learning_rate(train.schedule, train.optimizer.learning_rate, int(step) - 1, train.steps)
        assert tokens == f"{int(step) * train.batch_tokens:,}"
        assert rate == f"{expected:.1e}", step
        assert (len(row) == 5) == (int(step) % train.validate_every_steps == 0), step


def test_losses_are_near_those_that_the_demo_ended_with() -> None:
    readme = (ROOT / "README.md").read_text()
    loss = re.search(r"at step 1, ([\d.]+) at step \d+", readme)
    bits = re.search(r"\*\*([\d.]+) bits per byte\*\*", readme)
    assert loss, "the README shows no last loss"
    assert bits, "the README shows no bits per byte"
    for row in ROWS:
        assert float(row[3]) == pytest.approx(float(loss[1]), rel=0.2), row
        assert all(float(value) == pytest.approx(float(bits[1]), rel=0.1) for value in row[4:]), row
