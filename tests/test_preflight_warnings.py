"""Warnings about settings that do not fit the length of a run or its ranks: the same in train, plan and doctor."""

import json
from pathlib import Path
from typing import Any

import pytest

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.preflight import recipe_warnings
from tinyllama.recipe import Recipe

STEP = 6 * 64
"""Tokens per step of the small recipe, whose warm-up has 5 of its 40 steps."""


def warned_places(small: Path, ranks: int | None = None, **fields: Any) -> list[str]:
    recipe = Recipe.load(small / "recipe.yaml", {name.replace("__", "."): value for name, value in fields.items()})
    return [line.partition(":")[0] for line in recipe_warnings(recipe, ranks)]


def test_bundled_recipes_have_no_warnings(small: Path) -> None:
    assert warned_places(small, ranks=3) == []
    for name, ranks in (
        ("demo", 1),
        ("tinyllama-120m", 8),
        ("tinyllama-1.1b", 16),
        ("tinyllama-1.1b-modern", 16),
        ("llama3-1b", 16),
    ):
        assert recipe_warnings(Recipe.load(name), ranks) == []


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 9, 10, 11, 12, 13, 40])
@pytest.mark.parametrize("decay_fraction", [0.01, 0.5, 0.9, 1.0])
def test_schedule_that_misses_its_peak_or_final_rate_has_a_warning(
    small: Path, name: str, warmup: int, decay_fraction: float
) -> None:
    schedule = {"warmup_steps": warmup, "name": name, "decay_fraction": decay_fraction}
    fields = {f"train.schedule.{field}": value for field, value in schedule.items()}
    recipe = Recipe.load(small / "recipe.yaml", fields | {"train.tokens": 12 * STEP})
    peak, final = recipe.train.optimizer.learning_rate, recipe.train.schedule.final_learning_rate
    rates = [recipe.train.learning_rate_at(step) for step in range(12)]
    is_missed = max(rates) < 0.95 * peak or abs(rates[-1] - final) > 0.05 * peak
    warnings = [line for line in recipe_warnings(recipe) if line.startswith("train.schedule:")]
    assert len(warnings) == is_missed
    for warning in warnings:
        assert f"{max(rates):.3g} " in warning
        assert f"{rates[-1]:.3g} " in warning


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"train__tokens": 12 * STEP, "checkpoint__every_steps": 4}, "train.validate_every_steps"),
        ({"train__validate_every_steps": 41}, "train.validate_every_steps"),
        ({"train__evaluate_every_steps": 41}, "train.evaluate_every_steps"),
        ({"checkpoint__every_steps": 41}, "checkpoint.every_steps"),
        ({"checkpoint__every_steps": 99, "release__at_tokens": [40 * STEP]}, "checkpoint.every_steps"),
        ({"release__at_tokens": [5 * STEP, 40 * STEP + 1]}, "release.at_tokens"),
        ({"release__every_tokens": 50 * STEP}, "release.every_tokens"),
        ({"data__stages": [{"from_tokens": 90 * STEP, "weights": {"lines": 1}}]}, "data.stages"),
        ({"train__batch_sequences": 14, "train__micro_batch_sequences": 6, "ranks": 2}, "train.micro_batch_sequences"),
    ],
)
def test_setting_without_effect_in_the_run_has_a_warning(small: Path, fields: dict[str, Any], place: str) -> None:
    assert place in warned_places(small, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"checkpoint__every_steps": 99, "release__at_tokens": [39 * STEP]},
        {"checkpoint__every_steps": 40, "train__validate_every_steps": 40},
        {"release__at_tokens": [40 * STEP], "release__every_tokens": 40 * STEP},
        {"data__stages": [{"from_tokens": 40 * STEP - 1, "weights": {"lines": 1}}]},
    ],
)
def test_setting_with_effect_at_the_last_step_has_no_warning(small: Path, fields: dict[str, Any]) -> None:
    assert warned_places(small, **fields) == []


def test_final_rate_above_the_peak_is_refused(small: Path) -> None:
    with pytest.raises(InputError, match=r"recipe.yaml: train: .*0.0003 .* peak"):
        Recipe.load(small / "recipe.yaml", {"train.optimizer.learning_rate": 2e-4})
    Recipe.load(small / "recipe.yaml", {"train.optimizer.learning_rate": 3e-4})


def test_train_plan_and_doctor_print_the_same_warnings(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {"train.tokens": 3 * STEP, "release.every_tokens": 4 * STEP, "data.validation_fraction": 0.1}
    recipe = [
        str(small / "recipe.yaml"),
        *(word for name, value in fields.items() for word in (f"--{name}", str(value))),
    ]
    places = ["train.schedule", "train.validate_every_steps", "checkpoint.every_steps", "release.every_tokens"]
    assert cli.main(["train", *recipe]) == 0
    trained = capsys.readouterr().err.splitlines()
    assert cli.main(["plan", *recipe, "--hardware", "h100"]) == 0
    planned = capsys.readouterr().err.splitlines()
    assert planned[-1].startswith(f"next: tinyllama doctor {recipe[0]} --train.tokens ")
    assert cli.main(["doctor", *recipe, "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["checks"] if row["section"] == "recipe"]
    listed = [row["found"] for row in rows if row["what"] == "settings" and row["status"] == "warning"]
    assert [line.partition(":")[0] for line in listed] == places
    assert {*listed} <= {*trained} & {*planned}


def test_doctor_lists_sources_without_validation_text(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = ["--train.sequence_length", "1000000", "--model.context_length", "1000000"]
    cli.main(["doctor", str(small / "recipe.yaml"), *longer, "--json"])
    listed = [row["found"] for row in json.loads(capsys.readouterr().out)["checks"] if row["what"] == "settings"]
    for name in ("modules", "lines"):
        assert any(line.startswith(f"{small / 'store'}/{name}: ") and "validation" in line for line in listed)
