"""Command-line parsing: tyro parses a command's own arguments; this module parses the recipe and its field flags.

`describe` returns the arguments of a command for its help, for the shell completion and for suggestions.
"""

import contextlib
import difflib
import functools
import inspect
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from tinyllama.errors import InputError
from tinyllama.formatting import echo
from tinyllama.recipe import Recipe, bundled_recipes
from tinyllama.recipe.loading import parse_yaml, suggest_recipe_field

Command = Callable[..., int | None]

HELP_FLAGS = ("-h", "--help", "--help-all")
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]
_EXPECTED = {"INT": "an integer", "FLOAT": "a number", "TEXT": "a text", "PATH": "a path"}
_METAVARS: dict[type, str] = {bool: "", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Argument:
    """One argument of a command."""

    name: str
    """Name of a positional argument, such as MODEL, or the flag, such as `--top-k`."""
    metavar: str
    """Placeholder of a flag's value; empty for a flag without a value."""
    text: str
    """Description, from the command's docstring."""
    default: Any
    """Default value; `inspect.Parameter.empty` if the argument is required."""
    choices: tuple[str, ...]
    """All allowed values, if there are few."""

    @property
    def is_flag(self) -> bool:
        """Whether this is a flag, not a positional argument."""
        return self.name.startswith("--")

    @property
    def is_required(self) -> bool:
        """Whether the argument has no default."""
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class Description:
    """A command as its help shows it."""

    summary: str
    details: str
    examples: list[str]
    arguments: list[Argument]
    recipe: Literal["required", "optional"] | None
    """Whether the command takes a recipe and its fields."""


def describe(name: str, function: Command) -> Description:
    """Return the description of a command from its function's signature and docstring."""
    docs = docstring_parser.parse(function.__doc__ or "", style=docstring_parser.DocstringStyle.GOOGLE)
    texts = {one.arg_name: " ".join((one.description or "").split()) for one in docs.params}
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    recipe: Literal["required", "optional"] | None = None
    if hints.get("recipe") == Recipe:
        recipe = "optional" if name == "demo" else "required"
    elif hints.get("recipe") == Recipe | None:
        recipe = "optional"
    arguments = [
        _argument(parameter, hints[parameter.name], texts.get(parameter.name, ""))
        for parameter in parameters.values()
        if not (recipe and parameter.name == "recipe")
    ]
    details = " ".join((docs.long_description or "").split())
    examples = [line for one in docs.examples for line in (one.description or "").splitlines()]
    return Description(docs.short_description or "", details, examples, arguments, recipe)


def _argument(parameter: inspect.Parameter, hint: Any, text: str) -> Argument:
    metadata: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        metadata = tuple(rest)
    metavar, choices = _metavar(hint)
    metavar = next((found for one in metadata if (found := getattr(one, "metavar", None))), metavar)
    if _POSITIONAL in metadata:
        return Argument(metavar, "", text, parameter.default, choices)
    flag = ("no-" if parameter.default is True else "") + parameter.name.replace("_", "-")
    return Argument(f"--{flag}", metavar, text, parameter.default, choices)


def _metavar(hint: Any) -> tuple[str, tuple[str, ...]]:
    """Return the placeholder and the allowed values of a type."""
    origin, inner = get_origin(hint), [one for one in get_args(hint) if one not in (NoneType, Ellipsis)]
    if origin is Literal:
        return f"{{{','.join(inner)}}}", tuple(inner)
    if origin in (Union, UnionType):
        return _metavar(inner[0])
    if origin is tuple:
        metavar, choices = _metavar(inner[0])
        return f"{metavar} ...", choices
    return _METAVARS[hint], ()


def usage(name: str, description: Description) -> str:
    """Return the usage line of a command."""
    words = [f"tinyllama {name}"]
    if description.recipe:
        words.append("RECIPE" if description.recipe == "required" else "[RECIPE]")
    positional = [one for one in description.arguments if not one.is_flag]
    words += [one.name if one.is_required else f"[{one.name}]" for one in positional]
    words.append("[OPTIONS]")
    return " ".join([*words, "[--FIELD VALUE ...]"] if description.recipe else words)


def parse(name: str, function: Command, arguments: list[str]) -> Callable[[], int | None]:
    """Parse a command's arguments and return a function that calls the command.

    If the command takes a recipe, flags for the recipe's fields, such as `--train.tokens 1000000`, override the
    recipe's values. Raises InputError for wrong arguments.
    """
    description = describe(name, function)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    wants_help = {*HELP_FLAGS} & {*arguments[:end]}
    if not description.recipe:
        if wants_help:
            return functools.partial(_print_help, name, description, None, False)
        _check_flags(name, description, arguments)
        return _parse_own(name, function, description, arguments)
    own, overrides = extract_overrides(arguments, [one.name for one in description.arguments])
    source = own.pop(0) if own and not own[0].startswith("-") else None
    if wants_help:
        recipe = Recipe.load(source or "demo", overrides)
        return functools.partial(_print_help, name, description, recipe, "--help-all" in wants_help)
    _check_flags(name, description, own)
    if source is None and name != "demo":
        if description.recipe == "required" or overrides:
            raise InputError(f"{name}: name a recipe first: a YAML file or one of {', '.join(bundled_recipes())}")
        return _parse_own(name, function, description, own, None)
    return _parse_own(name, function, description, own, Recipe.load(source or "demo", overrides))


def _print_help(name: str, description: Description, recipe: Recipe | None, with_fields: bool) -> None:
    from tinyllama.cli.help import command_help  # noqa: PLC0415 - imports this module

    echo("\n".join(command_help(name, description, recipe, with_fields)))


def _parse_own(
    name: str, function: Command, description: Description, arguments: list[str], *bound: Recipe | None
) -> Callable[[], int | None]:
    """Parse a command's own arguments with tyro; `bound` contains the recipe, if the command takes one."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], int | None]:
        return functools.partial(function, *args, **kwargs)

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            call: Callable[[], int | None] = tyro.cli(
                functools.partial(bind, *bound),
                args=arguments,
                prog=f"tinyllama {name}",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit:
        # tyro prints a title and text between rules, which are ASCII if the terminal has no Unicode.
        lines = [line.strip("╭╮╰╯│─ ") for line in errors.getvalue().splitlines()[1:]]
        message = " ".join(takewhile(_has_text, dropwhile(lambda line: not _has_text(line), lines)))
        raise InputError(f"{name}: {_clarify(message, name, description)}") from None
    return call


def _has_text(line: str) -> bool:
    return bool(line.strip("- "))


def _clarify(message: str, name: str, description: Description) -> str:
    """Return tyro's message in the words of the command's help."""
    if message.startswith("Missing from"):
        missing = [one.name for one in description.arguments if one.is_required and one.name in message]
        return f"{' and '.join(missing)} missing; usage: {usage(name, description)}"
    if message.startswith("Unrecognized options: "):
        words = message.removeprefix("Unrecognized options: ")
        return f"{words}: unexpected; usage: {usage(name, description)}, with a text of several words in quotes"
    for argument in description.arguments:
        if re.search(rf"(Error parsing|for argument) '?({argument.name}|{argument.name.lower()})\b", message):
            found = re.search(r"'(.*?)'", message)
            given = f"{found[0]} is not valid" if found and found[1] != argument.name else "no value"
            choices = f"one of {', '.join(argument.choices)}" if argument.choices else ""
            return f"{argument.name}: {given}; give {choices or _EXPECTED.get(argument.metavar, argument.metavar)}"
    return f"{message}; see `tinyllama {name} --help`"


def _check_flags(name: str, description: Description, arguments: Sequence[str]) -> None:
    """Check that the command has each flag in its arguments. Raises InputError with a suggestion otherwise."""
    known = [*(one.name for one in description.arguments if one.is_flag), *HELP_FLAGS, "--quiet"]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for word in arguments[:end]:
        flag = word.partition("=")[0]
        if not re.match("--[A-Za-z]", flag) or flag.replace("_", "-") in known:
            continue
        close = [one for one in known if one.startswith(flag.replace("_", "-"))]
        close = close or difflib.get_close_matches(flag.replace("_", "-"), known, n=1, cutoff=0.65)
        field = suggest_recipe_field(flag[2:], Recipe, "--") if description.recipe and not close else ""
        hint = f"did you mean {close[0]}?" if close else field
        raise InputError(f"{name}: {flag}: unknown option; {hint or f'see `tinyllama {name} --help`'}")


def pop_quiet_flag(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments without `--quiet`, and whether `--quiet` was given before the first `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own = [word for word in arguments[:end] if word != "--quiet"]
    return [*own, *arguments[end:]], len(own) < end


def extract_overrides(arguments: Sequence[str], flags: Sequence[str] = ()) -> tuple[list[str], dict[str, Any]]:
    """Return a command's own arguments, and a dict from the recipe's fields to the values that override them.

    An override is `--field.inner value` or `--field.inner=value`. A value that begins like a list, a mapping or null is
    parsed as YAML. Any other value is a string. The command's own `flags` are never overrides: `plan` has a flag
    `--vocab-size`, and a recipe has a field `vocab_size`.
    """
    own: list[str] = []
    overrides: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        match = re.fullmatch(r"--([a-z_0-9-]+)((?:\.[\w-]+)*)(?:=(.*))?", word, re.DOTALL)
        is_own = match and not match[2] and f"--{match[1].replace('_', '-')}" in flags
        if not match or is_own or (not match[2] and match[1] not in Recipe.model_fields):
            own.append(word)
            continue
        value = match[3] if match[3] is not None else next(words, None)
        if value is None:
            raise InputError(f"{word}: missing value; give it after the flag")
        is_yaml = re.match(r"[\[{]|null$", value)
        overrides[match[1] + match[2]] = parse_yaml(value, word) if is_yaml else value
    return own, overrides
