"""Documents of many megabytes stay UTF-8: as a Python string, one emoji makes four bytes of every character.

Of a long line of JSON the long strings are cut out before it is parsed, and unescaped a megabyte at a time, so that
reading a text of 200 MB takes 400 MB, whatever stands in it.
"""

import re
from typing import Any

import orjson

from tinyllama.prepare.lenient_json import Repaired, loads, without_lone_surrogates
from tinyllama.text import utf8_boundary_before

LONG_BYTES = 32 << 20
"""Size in bytes above which a document stays UTF-8."""
LONGEST_BYTES = 256 << 20
"""Size in bytes above which a document, or a line of JSON, is rejected; it bounds the memory of a reader."""

_PART_BYTES = 1 << 20
_REST_BYTES = 32 << 20  # of a line without its long strings
_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
# What may precede a cut: plain bytes, escapes, and both escapes of a surrogate pair. The first escape of a pair is lone
# if anything else follows it.
_WHOLE_ESCAPES = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB]..\\u[dD][c-fC-F].."
    rb"|\\u[dD][89abAB]..(?=[^\\]|\\[^u]|\\u(?![dD][c-fC-F])[0-9a-fA-F]{4}))*+",
    re.DOTALL,
)


def parse_long_line(line: bytes | bytearray) -> Any:
    """A line of JSON in which an object's long strings are their UTF-8 bytes.

    Long keys, and long strings further inside, which no document is, come as a short mark instead. A lone surrogate
    becomes U+FFFD, and the object a `Repaired`. None where the rest is too long. Raises orjson.JSONDecodeError where it
    is not valid.
    """
    spans = [match.span(1) for match in _STRING.finditer(line) if match.end() - match.start() > LONG_BYTES]
    marks = [f"\u0001{number}" for number in range(len(spans))]
    skeleton, done = bytearray(), 0
    for (start, stop), mark in zip(spans, marks, strict=True):
        skeleton += line[done:start] + orjson.dumps(mark)[1:-1]
        done = stop
    skeleton += line[done:]
    if len(skeleton) > _REST_BYTES:  # millions of empty lists take far more memory as objects
        return None
    value = loads(skeleton)
    if isinstance(value, dict):
        places, repaired = dict(zip(marks, spans, strict=True)), isinstance(value, Repaired)
        for key, field in value.items():
            if isinstance(field, str) and field in places:
                value[key], has_changed = _unescaped(line, *places[field])
                repaired |= has_changed
        return Repaired(value) if repaired else value
    return value


def _unescaped(line: bytes | bytearray, start: int, stop: int) -> tuple[bytearray, bool]:
    """The UTF-8 of a JSON string, and whether a lone surrogate in it has become U+FFFD."""
    text, repaired = bytearray(), False
    while start < stop:
        end = _cut(line, start, stop)
        part = b'"' + line[start:end] + b'"'
        try:
            text += orjson.loads(part).encode()
        except orjson.JSONDecodeError:
            text += orjson.loads(without_lone_surrogates(part)).encode()
            repaired = True
        start = end
    return text, repaired


def _cut(line: bytes | bytearray, start: int, stop: int) -> int:
    """Where a part of a JSON string may end: between two characters, at most a megabyte on."""
    limit = min(start + _PART_BYTES, stop)
    match = _WHOLE_ESCAPES.match(line, start, limit)
    end = match.end() if match else start
    end = utf8_boundary_before(line, end) if end < stop else end
    return end if end > start else limit  # of what cannot be cut, the parser says what is wrong with it
