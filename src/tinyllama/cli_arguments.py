"""Command-line parsing: tyro parses a command's own arguments; this module parses the recipe and its field flags."""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from tinyllama.errors import InputError
from tinyllama.formatting import echo
from tinyllama.recipe import Recipe, bundled_recipes
from tinyllama.recipe.loading import parse_yaml

Command = Callable[..., int | None]


def parse(name: str, function: Command, arguments: list[str], *bound: Recipe | None) -> Callable[[], int | None]:
    """Parse a command's arguments with tyro and return a function that calls the command.

    `bound` contains arguments that are passed to the command before the parsed arguments. Raises InputError, with the
    text of tyro's message, if tyro rejects the arguments.
    """

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], int | None]:
        return functools.partial(function, *args, **kwargs)

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            call: Callable[[], int | None] = tyro.cli(
                functools.partial(bind, *bound), args=arguments, prog=f"tinyllama {name}"
            )
    except SystemExit as end:
        if not end.code:
            return lambda: None  # tyro printed the help
        lines = [line.strip("╭╮╰╯│─ ").strip() for line in errors.getvalue().splitlines()]
        message = lines[1 : next((i for i, line in enumerate(lines) if i and not line), len(lines))]
        raise InputError(f"{name}: {' '.join(message)}; see `tinyllama {name} --help`") from None
    return call


def parse_with_recipe(name: str, function: Command, arguments: list[str]) -> Callable[[], int | None]:
    """Parse the arguments of a command that takes a recipe; return a function that calls the command.

    Flags for the recipe's fields, such as `--train.tokens 1000000`, override the recipe's values.
    """
    own, overrides = extract_overrides(arguments)
    source = own.pop(0) if own and not own[0].startswith("-") else None
    wants_help = {"-h", "--help"} & set(own)
    if source is None and name != "demo" and not wants_help:
        if function.__annotations__["recipe"] == Recipe or overrides:
            raise InputError(f"{name}: name a recipe first: a YAML file or one of {', '.join(bundled_recipes())}")
        return parse(name, function, own, None)
    recipe = Recipe.load(source or "demo", overrides)
    if wants_help:
        return functools.partial(_print_help, name, function, recipe)
    return parse(name, function, own, recipe)


def _print_help(name: str, function: Command, recipe: Recipe) -> None:
    parse(f"{name} RECIPE", function, ["--help"], recipe)
    echo(f"\nEach field of the recipe is a flag; the defaults shown are those of {recipe.name}.\n")
    with contextlib.suppress(SystemExit):
        tyro.cli(
            Recipe,
            args=["--help"],
            default=recipe,
            prog=f"tinyllama {name} RECIPE",
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        )


def pop_quiet_flag(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments without `--quiet`, and whether `--quiet` was given before the first `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own = [word for word in arguments[:end] if word != "--quiet"]
    return [*own, *arguments[end:]], len(own) < end


def extract_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return a command's own arguments, and a dict from the recipe's fields to the values that override them.

    An override is `--field.inner value` or `--field.inner=value`. A value that begins like a list, a mapping or null is
    parsed as YAML. Any other value is a string.
    """
    own: list[str] = []
    overrides: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        match = re.fullmatch(r"--([a-z_0-9-]+)((?:\.[\w-]+)*)(?:=(.*))?", word, re.DOTALL)
        if not match or (not match[2] and match[1] not in Recipe.model_fields):
            own.append(word)
            continue
        value = match[3] if match[3] is not None else next(words, None)
        if value is None:
            raise InputError(f"{word}: missing value; give it after the flag")
        is_yaml = re.match(r"[\[{]|null$", value)
        overrides[match[1] + match[2]] = parse_yaml(value, word) if is_yaml else value
    return own, overrides
