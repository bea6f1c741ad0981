"""Shell completion: scripts for bash, zsh and fish, with the commands, their options and the fields of a recipe.

A script contains everything that it completes, so that a key press starts no Python; awk reads the names of the sources
from a recipe. tyro's own scripts start Python, and complete neither recipes nor commands of two words.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import jinja2
from pydantic import BaseModel

from tinyllama.cli.arguments import Command, describe
from tinyllama.recipe import Recipe, Source, bundled_recipes
from tinyllama.recipe.loading import field_infos


@dataclass(frozen=True)
class Option:
    """One flag that a shell completes."""

    flag: str
    text: str
    takes_value: bool
    choices: tuple[str, ...]


_GENERAL = (
    Option("--help", "Show the options and examples", False, ()),
    Option("--quiet", "Hide the progress", False, ()),
)


_SOURCE_NAMES = r"""
/^[^ \t#]/ { in_data = /^data:/; indent = 0 }
in_data && indent && !/^ *(#|$)/ {
    match($0, /^ */)
    if (RLENGTH <= indent) indent = 0
    else if (!names || RLENGTH == names) {
        names = RLENGTH; sub(/^ */, ""); sub(/:.*/, ""); gsub(/"/, "")
        if ($0 ~ /^[A-Za-z0-9][A-Za-z0-9._-]*$/) print
    }
}
in_data && /^ +sources: *(#.*)?$/ { match($0, /^ */); indent = RLENGTH }
""".strip()
"""awk program that prints the names of a recipe's sources, if each source begins on its own line.

Other keys than valid names are not printed, because bash expands the words that it completes."""


def completion_script(shell: str, commands: Mapping[str, Command]) -> str:
    """Return the completion script of `bash`, `zsh` or `fish`."""
    entries = []
    for name, function in commands.items():
        description = describe(name, function)
        options = [
            Option(one.name, _first_sentence(one.text), bool(one.metavar), one.choices)
            for one in description.arguments
            if one.is_flag
        ]
        if description.recipe:
            options.append(Option("--help-all", "Show all fields of the recipe", False, ()))
        positional = [choice for one in description.arguments if not one.is_flag for choice in one.choices]
        entries.append(
            {
                "name": name,
                "text": description.summary.rstrip("."),
                "options": [*options, *_GENERAL],
                "takes_recipe": bool(description.recipe),
                "choices": positional,
            }
        )
    template = (resources.files("tinyllama") / "cli" / f"completion.{shell}.jinja").read_text(encoding="utf-8")
    # bash has ${#array[@]}, where jinja2 would begin a comment.
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, comment_start_string="<#", undefined=jinja2.StrictUndefined
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["fish_quote"] = _fish_quote
    environment.filters["zsh_item"] = lambda option: shlex.quote(f"{option.flag}:{option.text}")
    first_words = list(dict.fromkeys(name.partition(" ")[0] for name in commands))
    return environment.from_string(template).render(
        commands=entries,
        first_words=first_words,
        fields=_field_options(Recipe, "--"),
        source_fields=_field_options(Source, ""),
        recipes=bundled_recipes(),
        sources={name: list(Recipe.load(name).data.sources) for name in bundled_recipes()},
        source_names=_SOURCE_NAMES,
    )


def _field_options(model: type[BaseModel], prefix: str) -> list[Option]:
    """Return the fields of a part of a recipe as options, without those of the sources."""
    return [
        Option(flag, _first_sentence(info.description or ""), True, _choices(info.annotation))
        for flag, info in field_infos(model, prefix)
    ]


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the allowed values of a field, as far as its type lists them."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return "true", "false"
    if origin is Literal:
        return tuple(map(str, inner))
    if origin in (Annotated, Union, UnionType, tuple):
        return tuple(choice for one in inner if one is not NoneType for choice in _choices(one))
    return ()


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].partition("; ")[0].rstrip(".")


def _fish_quote(text: str) -> str:
    r"""Return a text in single quotes, in which fish interprets only \\ and \'."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
