"""Generator of docs/recipe.md, the reference of a recipe's fields; run by `make docs`.

The generator reads the pydantic models and the bundled recipes. A test compares the page in the repository with the
output.
"""

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from tinyllama.recipe import Recipe, bundled_recipes
from tinyllama.recipe.loading import RecipeModel, parse_tokens

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/recipe.md"
INTRODUCTION = """\
# Recipe reference

This page lists every field of a recipe with its type, default and meaning. A recipe is one YAML file. Each field can
also be set by the command-line flag with its dotted name, such as `--train.tokens 5M`, `--data.workers 4` or
`--release.tasks "[hellaswag, piqa]"`. `tinyllama train RECIPE --help-all` shows them with that recipe's values.

An unknown field, a value outside its range or a duplicate field causes a one-line error that names the file, the field
and the value. A token count may be written as `3T`, `105B`, `20M`, `512K` or `2e6`; K means 1,000.

`make docs` generates this page from the pydantic models of the recipe.

"""
NEXT = """\
Next: [prepare your own data](own-data.md), [train](training.md), [plan a run](planning.md).
"""
UNITS = {
    "steps": "steps",
    "sequences": "sequences",
    "seconds": "seconds",
    "words": "words",
    "gigabytes": "GB",
    "length": "tokens",
    "skips": "steps",
    "score": "standard deviations",
    "limit": "items",
    "time": "hours:minutes:seconds",
}
"""Unit of a field by the last word of its name."""


def page() -> str:
    """Return the page as Markdown."""
    sections = list(parts(Recipe))
    contents = [f"- [{title(path)}](#{anchor(path)}): {one_line(model.__doc__)}" for path, model in sections]
    contents.append("- [Bundled recipes](#bundled-recipes)")
    body = [section(path, model) for path, model in sections]
    return INTRODUCTION + "\n".join([*contents, "", *body, recipes(), NEXT])


def title(path: str) -> str:
    """Return the heading of a part, which is the top level or a nested section of the recipe."""
    return f"`{path}`" if path else "Top level"


def anchor(path: str) -> str:
    """Return the anchor of a part's heading."""
    return re.sub(r"[^\w-]", "", path).lower() or "top-level"


def one_line(text: str | None) -> str:
    """Return a docstring as one line, for a table."""
    return re.sub(r"\s+", " ", text or "").strip().replace("|", "\\|")


def parts(model: type[RecipeModel], path: str = "") -> Iterator[tuple[str, type[RecipeModel]]]:
    """Yield the dotted path and model of each part, in the recipe's order, the top level first."""
    yield path, model
    for name, field in model.model_fields.items():
        inner = part_of(field.annotation)
        if inner:
            yield from parts(inner, inner_path(path, name, field.annotation))


def inner_path(path: str, name: str, annotation: Any) -> str:
    """Return the dotted path of a part inside another part, with NAME in place of a key and N in place of an index."""
    key = {dict: ".NAME", tuple: "[N]"}.get(get_origin(annotation), "")
    return f"{path}.{name}{key}".lstrip(".")


def part_of(annotation: Any) -> type[RecipeModel] | None:
    """Return the part in a field's type, which may be a mapping, a list or a union; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, RecipeModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := part_of(inner))), None)


def section(path: str, model: type[RecipeModel]) -> str:
    """Return the section of a part: heading, description and table of fields."""
    rows = [table_row(path, name, field) for name, field in model.model_fields.items()]
    table = ["| field | value | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join([f"## {title(path)}", "", one_line(model.__doc__), "", *table, ""])


def table_row(path: str, name: str, field: FieldInfo) -> str:
    """Return a field's row of the table."""
    inner = part_of(field.annotation)
    if inner:
        origin = get_origin(field.annotation)
        prefix = "mapping from name to " if origin is dict else "list of " if origin is tuple else ""
        value = f"{prefix}[{inner.__name__}](#{anchor(inner_path(path, name, field.annotation))})"
    else:
        value = type_text(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
        unit = UNITS.get(name.rsplit("_", maxsplit=1)[-1])
        value += f", in {unit}" if unit else ""
        value += " or `null`" if field.default_factory_takes_validated_data else ""
    return f"| `{name}` | {value} | {default_text(field)} | {one_line(field.description)} |"


def default_text(field: FieldInfo) -> str:
    """Return a field's default in YAML, or `required`."""
    if field.is_required():
        return "**required**"
    depends_on_fields = field.default_factory_takes_validated_data  # null then means the default
    match None if depends_on_fields else field.get_default(call_default_factory=True):
        case None:
            return "`null`"
        case RecipeModel():
            return "its fields' defaults"
        case bool(value):
            return f"`{str(value).lower()}`"
        case tuple(values):
            return f"`[{', '.join(map(str, values))}]`"
        case value:
            return f"`{value}`"


def type_text(annotation: Any) -> str:
    """Return a description of a type, with its allowed values."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return bounded_text(inner[0], inner[1:])
    if origin is Literal:
        return (" or " if len(inner) == 2 else ", ").join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if member is type(None) else type_text(member) for member in inner)
    if origin is tuple:
        count = "" if Ellipsis in inner else f"{len(inner)} values: "
        return f"list of {count}{type_text(inner[0])}"
    if origin is dict:
        return f"mapping from name to {type_text(inner[1])}"
    return {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}[annotation]


def bounded_text(kind: Any, metadata: tuple[Any, ...]) -> str:
    """Return a description of a type with its bounds or pattern."""
    flat = [entry for outer in metadata for entry in (outer.metadata if isinstance(outer, FieldInfo) else [outer])]
    if any(getattr(entry, "func", None) is parse_tokens for entry in flat):
        return "token count" if any(isinstance(entry, Gt) for entry in flat) else "token count, or 0"
    signs = ((Gt, ">", "gt"), (Ge, "≥", "ge"), (Lt, "<", "lt"), (Le, "≤", "le"))
    bounds = [
        f"{sign} {bound_text(getattr(entry, attribute))}"
        for entry in flat
        for bound, sign, attribute in signs
        if isinstance(entry, bound)
    ]
    pattern = next((entry.pattern for entry in flat if getattr(entry, "pattern", None)), None)
    text = type_text(kind) + (f" {', '.join(bounds)}" if bounds else "")
    return text + (f" that matches `{pattern}`" if pattern else "")


def bound_text(number: float) -> str:
    """Return a bound as text."""
    return "2^63" if number == 2**63 else f"{number:g}"


def recipes() -> str:
    """Return the section with the bundled recipes."""
    lines = ["## Bundled recipes", ""]
    lines += [
        "The package contains these recipes. Each command accepts the name of a bundled recipe instead of a path.",
        "",
    ]
    for name in bundled_recipes():
        text = (ROOT / "src/tinyllama/recipes" / f"{name}.yaml").read_text(encoding="utf-8").strip()
        lines += [f"### {name}", "", f"[`recipes/{name}.yaml`](../src/tinyllama/recipes/{name}.yaml)", ""]
        lines += ["```yaml", text, "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
