"""Help pages: the overview of all commands, and the page of one command."""

import json
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tinyllama.cli.arguments import Argument, Command, Description, describe, usage
from tinyllama.recipe import Recipe, bundled_recipes
from tinyllama.recipe.loading import RecipeModel

_MAX_WIDTH = 100
_GENERAL = (
    ("--help, -h", "Show this page."),
    ("--help-all", "Show this page with every field of the recipe and its value."),
    ("--quiet", "Hide the progress, but not warnings, errors and results."),
)


def overview(groups: Mapping[str, Mapping[str, Command]]) -> Iterator[str]:
    """Yield the lines of `tinyllama --help`: the commands by group."""
    yield "usage: tinyllama COMMAND ..."
    for group, commands in groups.items():
        yield ""
        yield f"{group}:"
        yield from _table(((name, describe(name, function).summary) for name, function in commands.items()), 17)
    yield ""
    yield "`tinyllama COMMAND --help` shows the options of a command, and examples."
    yield "`tinyllama --version` shows the version. --quiet hides a command's progress."


def command_help(name: str, description: Description, recipe: Recipe | None, with_fields: bool) -> Iterator[str]:
    """Yield the lines of a command's page; `with_fields` adds all fields of the recipe instead of their groups."""
    yield f"usage: {usage(name, description)}"
    yield ""
    yield from textwrap.wrap(" ".join(filter(None, (description.summary, description.details))), _width())
    if description.examples:
        yield ""
        yield "examples:"
        yield from (f"  {line}" for line in description.examples)
    if positional := list(positional_rows(name, description)):
        yield ""
        yield "arguments:"
        yield from _table(positional)
    yield ""
    yield "options:"
    yield from _table(option_rows(description))
    yield from _table(row for row in _GENERAL if recipe or row[0] != "--help-all")
    if recipe:
        yield ""
        yield from _all_fields(recipe, description) if with_fields else _field_groups(name, description)


def positional_rows(name: str, description: Description) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each positional argument of a command, the recipe first."""
    if description.recipe:
        text = f"A YAML file, or a bundled recipe: {', '.join(bundled_recipes())}."
        yield "RECIPE", text + (" Default: demo." if name == "demo" else "")
    yield from ((one.name, one.text) for one in description.arguments if not one.is_flag)


def option_rows(description: Description) -> Iterator[tuple[str, str]]:
    """Yield the flag and the text of each option of a command, without the options of all commands."""
    yield from (_flag_row(one) for one in description.arguments if one.is_flag)


def _flag_row(argument: Argument) -> tuple[str, str]:
    is_shown = argument.metavar and argument.default is not None and argument.default != ()
    value = " ".join(argument.default) if isinstance(argument.default, tuple) else argument.default
    default = f" Default: {value:g}." if isinstance(value, float) else f" Default: {value}."
    return f"{argument.name} {argument.metavar}".strip(), argument.text + (default if is_shown else "")


def _field_groups(name: str, description: Description) -> Iterator[str]:
    yield "recipe fields:"
    for field, info in Recipe.model_fields.items():
        if is_own_flag(field, description):
            continue
        flag = f"--{field}.FIELD" if _is_part(info.annotation) else f"--{field}"
        yield from _table([(f"{flag} VALUE", info.description or "")])
    yield ""
    words = f"Each field of the recipe is an option, such as --train.tokens 20M. `tinyllama {name} RECIPE --help-all`"
    yield from textwrap.wrap(f"{words} lists all fields with the recipe's values.", _width())


def is_own_flag(field: str, description: Description) -> bool:
    """Return whether the flag of a recipe's field is an option of the command itself, such as `--vocab-size`."""
    return any(argument.name == f"--{field.replace('_', '-')}" for argument in description.arguments)


def _is_part(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, RecipeModel)


def _all_fields(recipe: Recipe, description: Description) -> Iterator[str]:
    yield f"recipe fields, with the values of {recipe.name}:"
    yield from _table(
        (f"--{field} {_as_flag(value)}", text)
        for field, value, text in recipe_fields(recipe)
        if not is_own_flag(field, description)
    )


def recipe_fields(part: RecipeModel, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield the dotted name, the value and the description of each field of a recipe or of a part of it."""
    for name, info in type(part).model_fields.items():
        value = getattr(part, name)
        members = value if isinstance(value, dict) else {}
        if isinstance(value, RecipeModel):
            yield from recipe_fields(value, f"{prefix}{name}.")
        elif members and all(isinstance(member, RecipeModel) for member in members.values()):
            for key, member in members.items():
                yield from recipe_fields(member, f"{prefix}{name}.{key}.")
        else:
            plain = part.model_dump(mode="json", include={name}).get(name)  # null for the excluded `preset`
            yield prefix + name, plain, " ".join((info.description or "").split())


def _as_flag(value: Any) -> str:
    """Return a value as a command line accepts it for a field."""
    if isinstance(value, str):
        return value if value and value.isprintable() and not set(value) & set(" '\"\\$`<>|&;*?") else repr(value)
    text = json.dumps(value)
    return f"'{text}'" if isinstance(value, list | dict) else text


def _table(rows: Iterable[tuple[str, str]], term_width: int = 25) -> Iterator[str]:
    """Yield the lines of two columns, the second one wrapped; a long first cell has its own line."""
    indent = term_width + 3
    for term, text in rows:
        first = f"  {term}"
        if len(first) >= indent:
            yield first
            first = ""
        for line in textwrap.wrap(text, max(_width() - indent, 30), break_on_hyphens=False):
            yield f"{first:<{indent}}{line}"
            first = ""


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _MAX_WIDTH)
