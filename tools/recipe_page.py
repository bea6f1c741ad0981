"""The page of the recipe's fields, `docs/recipe.md`, from the models that read a recipe: `make docs` writes it.

Reads the pydantic models and the bundled recipes; writes Markdown. The page is checked in, so that it can be read
without building anything; a test holds it against what this program writes.
"""

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from tinyllama.recipe import Recipe, bundled_recipes
from tinyllama.recipe.fields import RecipeModel, parse_tokens

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/recipe.md"
INTRODUCTION = """\
# The recipe, field by field

A recipe is one YAML file. Every field is a flag too, by its dotted name: `--train.tokens 5M`, `--data.workers 4`,
`--release.tasks "[hellaswag, piqa]"`; `tinyllama train RECIPE --help` prints them with that recipe's values. A field
that does not exist, a value out of its range and a name given twice are refused in one line that names file, field and
value.

A count of tokens may be written `3T`, `105B`, `20M`, `512K` or `2e6`; K is a thousand. A field without a default must
be given. This page is written from the models that read a recipe (`make docs`), and a test holds it against them.

"""
UNITS = {
    "steps": "steps",
    "sequences": "rows",
    "seconds": "seconds",
    "words": "words",
    "gigabytes": "GB",
    "length": "tokens",
    "context_length": "tokens",
    "skips": "steps",
    "sigmas": "standard deviations",
    "limit": "items",
    "time": "hours:minutes:seconds",
}
"""The unit of a field by the last word of its name."""


def page() -> str:
    """The whole page as Markdown."""
    sections = "\n".join(section(path, model) for path, model in parts(Recipe))
    return f"{INTRODUCTION}{sections}\n{recipes()}"


def parts(model: type[RecipeModel], path: str = "") -> Iterator[tuple[str, type[RecipeModel]]]:
    """Dotted path and model of each part, in the recipe's order, the whole first."""
    yield path, model
    for name, field in model.model_fields.items():
        inner = part_of(field.annotation)
        if inner:
            yield from parts(inner, step_into(path, name, field.annotation))


def step_into(path: str, name: str, annotation: Any) -> str:
    """The dotted path of a part within a part; NAME and N stand for a key and a place in a list."""
    many = {dict: ".NAME", tuple: "[N]"}.get(get_origin(annotation), "")
    return f"{path}.{name}{many}".lstrip(".")


def part_of(annotation: Any) -> type[RecipeModel] | None:
    """The part that a field holds, also in a mapping, a list or beside null."""
    if isinstance(annotation, type) and issubclass(annotation, RecipeModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := part_of(inner))), None)


def section(path: str, model: type[RecipeModel]) -> str:
    """A part's heading, sentence and table."""
    heading = f"## `{path}`" if path else "## The whole"
    doc = re.sub(r"\s+", " ", model.__doc__ or "").strip()
    rows = [row(path, name, field) for name, field in model.model_fields.items()]
    table = ["| field | value | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join([heading, "", doc, "", *table, ""])


def row(path: str, name: str, field: FieldInfo) -> str:
    """A field's line of the table."""
    meaning = re.sub(r"\s+", " ", field.description or "").strip().replace("|", "\\|")
    inner = part_of(field.annotation)
    if inner:
        target = re.sub(r"[^\w-]", "", step_into(path, name, field.annotation)).lower()
        value = f"{many(field.annotation)}[{inner.__name__}](#{target})"
    else:
        value = described(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
    unit = None if inner else UNITS.get(name.rsplit("_", maxsplit=1)[-1])
    value += f", in {unit}" if unit else ""
    return f"| `{name}` | {value} | {default(field)} | {meaning} |"


def many(annotation: Any) -> str:
    """What stands before a part that is there several times."""
    return {dict: "by name: ", tuple: "list of "}.get(get_origin(annotation), "")


def default(field: FieldInfo) -> str:
    """A field's default as YAML says it; `required` where there is none."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "`null`"
    if isinstance(value, RecipeModel):
        return "its own defaults"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def described(annotation: Any) -> str:
    """A type in words, with what is allowed."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return bounded(inner[0], inner[1:])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner) if len(inner) < 3 else ", ".join(f"`{v}`" for v in inner)
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if one is type(None) else described(one) for one in inner)
    if origin is tuple:
        kinds = [one for one in inner if one is not Ellipsis]
        return f"list of {described(kinds[0])}" if Ellipsis in inner else f"list of {len(kinds)}: {described(kinds[0])}"
    if origin is dict:
        return f"by name: {described(inner[1])}"
    return {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}[annotation]


def bounded(kind: Any, metadata: tuple[Any, ...]) -> str:
    """A type with its bounds; a count of tokens by its name."""
    flat = [one for outer in metadata for one in (outer.metadata if isinstance(outer, FieldInfo) else [outer])]
    if any(getattr(one, "func", None) is parse_tokens for one in flat):
        return "count of tokens" if any(isinstance(one, Gt) for one in flat) else "count of tokens, or 0"
    signs = ((Gt, ">", "gt"), (Ge, "≥", "ge"), (Lt, "<", "lt"), (Le, "≤", "le"))
    bounds = [f"{sign} {written(getattr(one, name))}" for one in flat for c, sign, name in signs if isinstance(one, c)]
    pattern = next((one.pattern for one in flat if getattr(one, "pattern", None)), None)
    said = described(kind) + (f" {', '.join(bounds)}" if bounds else "")
    return said + (f" that matches `{pattern}`" if pattern else "")


def written(number: float) -> str:
    """A bound, a power of two where it is a large one."""
    return "2^63" if number == 2**63 else f"{number:g}"


def recipes() -> str:
    """The bundled recipes, whole."""
    lines = ["## The bundled recipes", "", "They come with the package, and are named without a path.", ""]
    for name in bundled_recipes():
        text = (ROOT / "src/tinyllama/recipes" / f"{name}.yaml").read_text(encoding="utf-8").strip()
        lines += [f"### {name}", "", f"[`recipes/{name}.yaml`](../src/tinyllama/recipes/{name}.yaml)", ""]
        lines += ["```yaml", text, "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
