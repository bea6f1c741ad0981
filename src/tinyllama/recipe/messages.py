"""The first problem of a recipe as one line for the person who wrote it."""

import difflib
import re
import reprlib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

# pydantic names the arm of a union that failed, such as data.workers.constrained-int, which is no field.
_PYDANTIC_UNION_TAG = re.compile(r"^(constrained-int|literal\[.*)$")

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3  # ten aliases in YAML can stand for more lists than any memory holds
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def abbreviated_repr(value: object) -> str:
    """A value as Python writes it, of a long one its ends."""
    return _SHORT.repr(value)


def printable(name: str) -> str:
    """A name from a file as it is, or where a line cannot hold it as Python writes it."""
    return name if name.isprintable() and len(name) <= _SHORT.maxstring else abbreviated_repr(name)


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half of a pair, which no file can."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def format_validation_error(error: ValidationError, whole: type[BaseModel]) -> str:
    """Place, value and remedy of the first thing that is wrong with a recipe, in one line; `whole` is its model."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if not _PYDANTIC_UNION_TAG.search(str(part))]
    dotted = ".".join(map(printable, place))
    if problem["type"] == "extra_forbidden":
        return f"{dotted}: unknown field; {_nearest_field(place, whole)}"
    if problem["type"] == "missing":
        return f"{dotted}: missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    if not dotted or isinstance(problem["input"], dict):
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted}: {abbreviated_repr(problem['input'])} {_predicate(message)}"


def _predicate(message: str) -> str:
    """Turn pydantic's "Input should be …, unable to …" into the end of a sentence about the value."""
    message = message.split(", unable to", maxsplit=1)[0].replace("Input should be", "should be")
    return message[0].lower() + message[1:]


def suggest(wrong: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """The known name that was perhaps meant; where none is as similar as `cutoff` (0 to 1), all of them."""
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known) or 'none'}"


def _nearest_field(place: list[str], whole: type[BaseModel]) -> str:
    part: Any = whole
    for name in place[:-1]:
        if hasattr(part, "model_fields"):
            part = part.model_fields[name].annotation
        else:  # a name in a dict of parts, or a place in a tuple of them
            part = next(inner for inner in get_args(part) if hasattr(inner, "model_fields"))
    return suggest(place[-1], list(part.model_fields))
