"""A block of YAML: a whole recipe, or a part of one that is put into a recipe."""

from pathlib import Path
from typing import Any

import yaml
from tests.docs.blocks import Block
from tests.docs.world import write_recipe

from tinyllama.recipe import Recipe
from tinyllama.recipe.data_schema import Data


def check_recipe(block: Block, folder: Path) -> None:
    """A whole recipe loads; a part of one stands in a recipe that loads."""
    fields = yaml.safe_load(block.body)
    path = folder / ".recipe.yaml"
    if not {"name", "model", "train"} <= fields.keys():
        write_recipe(path, "base")
        fields = merged(yaml.safe_load(path.read_text()), whole(fields, block))
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    Recipe.load(path)


def whole(part: dict[str, Any], block: Block) -> dict[str, Any]:
    """A part of a recipe, from the recipe's top; sources that its mixes name are added."""
    if not part.keys() - Recipe.model_fields.keys():
        return part
    if not part.keys() - Data.model_fields.keys():
        named = {name for stage in part.get("stages", []) for name in stage["weights"]}
        added = {name: {"format": "text", "path": "raw/manuals", "weight": 1} for name in named}
        return {"data": {"sources": added} | part}
    assert all("format" in value for value in part.values()), f"{block.place}: part of no recipe"
    return {"data": {"sources": part}}


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return base | {
        name: merged(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in change.items()
    }
