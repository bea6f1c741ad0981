"""Learning-rate schedules: warm-up, cosine and WSD, down to the final rate."""

import itertools

import pytest

from tinyllama.recipe import Recipe, Train


def rates_of(steps: int, **schedule: object) -> list[float]:
    """Return the learning rate of each step of a run with the peak 1e-3."""
    fields = {"tokens": steps, "sequence_length": 1, "batch_sequences": 1, "micro_batch_sequences": 1}
    train = Train.model_validate(fields | {"optimizer": {"learning_rate": 1e-3}, "schedule": schedule})
    return [train.learning_rate_at(step) for step in range(steps)]


def test_cosine_of_the_model_card_has_its_published_rates() -> None:
    train = Recipe.load("tinyllama-1.1b").train
    assert train.learning_rate_at(0) == pytest.approx(4e-4 / 2000)
    assert train.learning_rate_at(999) == pytest.approx(2e-4)
    assert train.learning_rate_at(1999) == pytest.approx(4e-4)
    assert train.learning_rate_at(240_000) == pytest.approx(3.76e-4, rel=1e-3)
    assert train.learning_rate_at(train.steps - 1) == pytest.approx(4e-5)


def test_cosine_decreases_at_every_step_after_the_warmup() -> None:
    rates = rates_of(200, name="cosine", warmup_steps=10, final_learning_rate=1e-5)
    assert rates[9] == max(rates) == 1e-3
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_wsd_is_constant_and_then_decays_linearly_to_the_final_rate() -> None:
    rates = rates_of(100, name="wsd", warmup_steps=10, final_learning_rate=0.0, decay_fraction=0.2)
    assert rates[10:80] == [1e-3] * 70
    assert rates[-1] == 0.0
    assert [earlier - later for earlier, later in itertools.pairwise(rates[79:])] == pytest.approx([1e-3 / 20] * 20)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_run_of_one_step_has_a_rate(name: str) -> None:
    (rate,) = rates_of(1, name=name, warmup_steps=0, final_learning_rate=1e-5)
    assert 0 < rate <= 1e-3
