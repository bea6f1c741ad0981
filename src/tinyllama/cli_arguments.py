"""A command line's words as a call: a command's own arguments by tyro, a recipe and its fields' flags by hand."""

import contextlib
import functools
import inspect
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from tinyllama.errors import InputError
from tinyllama.formatting import echo
from tinyllama.recipe import Recipe, bundled_recipes
from tinyllama.recipe.loading import parse_yaml


def parse(name: str, function: Callable[..., int | None], arguments: list[str]) -> Callable[[], int | None]:
    """Read a command's own arguments with tyro; its boxed error becomes one line."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], int | None]:
        return functools.partial(function, *args, **kwargs)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            call: Callable[[], int | None] = tyro.cli(bind, args=arguments, prog=f"tinyllama {name}")
    except SystemExit as end:
        if end.code:
            raise InputError(f"{name}: {_one_line(said.getvalue())}; see `tinyllama {name} --help`") from None
        return lambda: None  # it printed its help
    return call


def _one_line(boxed: str) -> str:
    lines = [line.strip("╭╮╰╯│─ ").strip() for line in boxed.splitlines()]
    body = lines[1 : next((i for i, line in enumerate(lines) if i and not line), len(lines))]
    return " ".join(body)


def parse_with_recipe(name: str, function: Callable[..., int | None], arguments: list[str]) -> Callable[[], int | None]:
    """Read a recipe and its fields' flags; what is left are the command's own arguments."""
    own, overrides = extract_overrides(arguments)
    named = own.pop(0) if own and not own[0].startswith("-") else None
    wants_help = {"-h", "--help"} & set(own)
    is_optional = function.__annotations__["recipe"] != Recipe and not overrides
    if named is None and name != "demo" and not wants_help:
        if not is_optional:
            raise InputError(f"{name}: name a recipe first: a YAML file or one of {', '.join(bundled_recipes())}")
        return parse(name, _bind_recipe(function, None), own)
    recipe = Recipe.load(named or "demo", overrides)
    if wants_help:
        return functools.partial(_print_fields, name, function, recipe)
    return parse(name, _bind_recipe(function, recipe), own)


def _bind_recipe(function: Callable[..., int | None], recipe: Recipe | None) -> Callable[..., int | None]:
    """The command with its recipe given: what is left of its signature is what tyro reads."""
    signature = inspect.signature(function)
    left = [parameter for parameter in signature.parameters.values() if parameter.name != "recipe"]

    def call(**options: Any) -> int | None:
        return function(recipe, **options)

    call.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    call.__doc__ = function.__doc__
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in left}
    return call


def _print_fields(name: str, function: Callable[..., int | None], recipe: Recipe) -> None:
    with contextlib.suppress(SystemExit):
        own = _bind_recipe(function, recipe)
        tyro.cli(own, args=["--help"], prog=f"tinyllama {name} RECIPE")
    echo(f"\nAny field of the recipe is a flag too; shown are {recipe.name}'s values.\n")
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
    """The words without `--quiet`, and whether it was among them; after `--` it is a word like any other."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own = [word for word in arguments[:end] if word != "--quiet"]
    return [*own, *arguments[end:]], len(own) < end


def extract_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Part `--field.inner value` and `--field.inner=value` of a recipe from a command's own arguments.

    A value reads as YAML where it begins like a list, a mapping or null; otherwise it is the text that it is.
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
            raise InputError(f"{word}: its value is missing; give it after the flag")
        overrides[match[1] + match[2]] = _flag_value(word, value)
    return own, overrides


def _flag_value(flag: str, text: str) -> Any:
    if not re.match(r"[\[{]|null$", text):
        return text
    try:
        return parse_yaml(text, flag)
    except InputError as error:
        raise InputError(str(error).replace(f"{flag}:1:", f"{flag}:", 1)) from None  # a flag has one line
