"""The preset `web` of `clean` expands to fields, and fields that the recipe sets have precedence."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from tests.conftest import small_recipe

from tinyllama.recipe import Cleaning, Recipe

FINEWEB = Cleaning(
    url_block_lists=("fineweb",),
    languages=("en",),
    min_language_probability=0.65,
    filters=("gopher_repetition", "gopher_quality", "c4", "fineweb"),
    c4_terminal_punctuation=False,
    deduplicate="minhash",
    mask_personal_data=True,
    language="en",
)


def recipe_file(tmp_path: Path, clean: Any) -> Path:
    fields = small_recipe(tmp_path)
    fields["data"]["sources"] = {"web": {"format": "jsonl", "path": "raw", "weight": 1, "clean": clean}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def test_a_preset_is_equal_to_its_fields(tmp_path: Path) -> None:
    for clean in ("web", {"preset": "web"}):
        recipe = Recipe.load(recipe_file(tmp_path, clean))
        assert recipe.data.sources["web"].clean == FINEWEB
        assert "preset:" not in recipe.to_yaml()
        assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("given", ["web", {"preset": "web"}])
def test_fields_and_flags_change_single_settings_of_a_preset(tmp_path: Path, given: Any) -> None:
    prefix = "data.sources.web.clean"
    recipe = Recipe.load(recipe_file(tmp_path, given), {f"{prefix}.languages": ["de"], f"{prefix}.deduplicate": None})
    expected = FINEWEB.model_dump() | {"languages": ("de",), "language": "de", "deduplicate": None}
    assert recipe.data.sources["web"].clean.model_dump() == expected


@pytest.mark.parametrize(
    ("fields", "language"),
    [({"languages": "fr"}, "fr"), ({"languages": ["fr", "de"], "language": "de"}, "de"), ({}, "en")],
    ids=["first", "given", "default"],
)
def test_words_are_split_by_the_rules_of_the_first_language(fields: dict[str, Any], language: str) -> None:
    assert Cleaning.model_validate(fields).language == language


@pytest.mark.parametrize("fields", ["wub", {"preset": "wub"}, {"preset": ["web"]}, 3, {"languages": [3]}])
def test_wrong_values_are_refused(fields: Any) -> None:
    with pytest.raises(ValidationError):
        Cleaning.model_validate(fields)
