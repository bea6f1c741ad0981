"""Learning-rate schedules: warm-up, cosine and WSD, down to the final rate."""

import itertools

import pytest

from tinyllama.recipe import Recipe, Schedule
from tinyllama.train.schedule import learning_rate


def test_cosine_of_the_model_card_has_its_published_rates() -> None:
    recipe = Recipe.load("tinyllama-1.1b")
    schedule, peak, steps = recipe.train.schedule, recipe.train.optimizer.learning_rate, recipe.train.steps
    rates = {step: learning_rate(schedule, peak, step, steps) for step in (0, 999, 1999, 2000, 240_000, steps - 1)}
    assert rates[0] == pytest.approx(4e-4 / 2000)
    assert rates[999] == pytest.approx(2e-4)
    assert rates[1999] == pytest.approx(4e-4)
    assert rates[240_000] == pytest.approx(3.76e-4, rel=1e-3)
    assert rates[steps - 1] == pytest.approx(4e-5)


def test_cosine_decreases_at_every_step_after_the_warmup() -> None:
    schedule = Schedule(name="cosine", warmup_steps=10, final_learning_rate=1e-5)
    rates = [learning_rate(schedule, 1e-3, step, 200) for step in range(200)]
    assert rates[9] == max(rates) == 1e-3
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_wsd_is_constant_and_then_decays_linearly_to_the_final_rate() -> None:
    schedule = Schedule(name="wsd", warmup_steps=10, final_learning_rate=0.0, decay_fraction=0.2)
    rates = [learning_rate(schedule, 1e-3, step, 100) for step in range(100)]
    assert rates[10:80] == [1e-3] * 70
    assert rates[-1] == 0.0
    assert [earlier - later for earlier, later in itertools.pairwise(rates[79:])] == pytest.approx([1e-3 / 20] * 20)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_run_of_one_step_has_a_rate(name: str) -> None:
    schedule = Schedule.model_validate({"name": name, "warmup_steps": 0, "final_learning_rate": 1e-5})
    assert 0 < learning_rate(schedule, 1e-3, 0, 1) <= 1e-3
