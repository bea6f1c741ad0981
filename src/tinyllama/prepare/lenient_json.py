"""JSON as Python's json reads it: with NaN, Infinity and numbers of any size, which orjson refuses.

orjson is tried first, since it is several times as fast. A lone surrogate, one escape of a pair, has no UTF-8 and
becomes U+FFFD.
"""

import json
import re
from typing import Any

import orjson

# An escape, the two of a pair together; the group is a lone surrogate.
_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.DOTALL
)


class Repaired(dict[str, Any]):
    """An object in which a lone surrogate has become U+FFFD."""


def loads(data: bytes | bytearray) -> Any:
    """Parse JSON. Raises orjson.JSONDecodeError where Python's json cannot read it either."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        repaired = without_lone_surrogates(data)
        try:
            value = json.loads(str(repaired, "utf-8"))
        except (ValueError, RecursionError):
            raise error from None
        return Repaired(value) if isinstance(value, dict) and repaired != data else value


def without_lone_surrogates(data: bytes | bytearray) -> bytes:
    """Return the JSON with the escape of U+FFFD in place of each lone surrogate's."""
    return _ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], data)
