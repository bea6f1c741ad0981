"""Parser of JSON lines, with support for numbers that orjson refuses, lone surrogates and very long strings.

Long strings are removed from a line before orjson parses the line. Then the strings are unescaped into UTF-8, one
megabyte at a time. A document of 200 MB thus takes 400 MB of memory, no matter which characters it contains.
"""

import json
import re
from typing import Any

import orjson

from tinyllama.errors import InputError
from tinyllama.prepare.streams import LONG_BYTES, TOO_LONG
from tinyllama.text import is_utf8, utf8_boundary_before

_PART_BYTES = 1 << 20
_MAX_REST_BYTES = 32 << 20  # maximum size of a line without its long strings
_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
# An escape, or the two escapes of a surrogate pair; group 1 is the escape of a lone surrogate.
_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.DOTALL
)
# Plain bytes and complete escapes, after which a string can be cut. The escape of a high surrogate is complete only
# with the escape of its low surrogate, or if the next bytes show that no low surrogate follows.
_COMPLETE_ESCAPES = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB]..\\u[dD][c-fC-F].."
    rb"|\\u[dD][89abAB]..(?=[^\\]|\\[^u]|\\u(?![dD][c-fC-F])[0-9a-fA-F]{4}))*+",
    re.DOTALL,
)


class RepairedObject(dict[str, Any]):
    """An object with a lone surrogate that was replaced by U+FFFD."""


def parse_json(data: bytes | bytearray) -> Any:
    """Parse JSON like Python's json module, with NaN, Infinity and numbers of any size.

    Lone surrogates are replaced by U+FFFD. Raises orjson.JSONDecodeError if Python's json module cannot parse `data`.
    """
    try:
        return orjson.loads(data)  # several times as fast as the json module
    except orjson.JSONDecodeError as error:
        repaired = _replace_lone_surrogates(data)
        try:
            value = json.loads(str(repaired, "utf-8"))
        except (ValueError, RecursionError):
            raise error from None
        return RepairedObject(value) if isinstance(value, dict) and repaired != data else value


def _replace_lone_surrogates(data: bytes | bytearray) -> bytes:
    """Replace the escape of each lone surrogate, which UTF-8 cannot represent, by the escape of U+FFFD."""
    return _ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], data)


def parse_long_line(line: bytes | bytearray) -> Any:
    """Parse a line of JSON; an object's strings of more than LONG_BYTES become their UTF-8 bytes.

    Long keys, and long strings in nested values, become short placeholders. A lone surrogate becomes U+FFFD, and the
    object that contains it becomes a `RepairedObject`. Returns None if the line without its long strings is longer than
    _MAX_REST_BYTES.
    Raises orjson.JSONDecodeError if the line is invalid.
    """
    spans = [match.span(1) for match in _STRING.finditer(line) if match.end() - match.start() > LONG_BYTES]
    placeholders = [f"\u0001{number}" for number in range(len(spans))]
    rest, done = bytearray(), 0
    for (start, stop), placeholder in zip(spans, placeholders, strict=True):
        rest += line[done:start] + orjson.dumps(placeholder)[1:-1]
        done = stop
    rest += line[done:]
    if len(rest) > _MAX_REST_BYTES:  # millions of empty lists take far more memory as Python objects
        return None
    value = parse_json(rest)
    if isinstance(value, dict):
        span_of, is_repaired = dict(zip(placeholders, spans, strict=True)), isinstance(value, RepairedObject)
        for key, field in value.items():
            if isinstance(field, str) and field in span_of:
                value[key], has_changed = _unescape(line, *span_of[field])
                is_repaired |= has_changed
        return RepairedObject(value) if is_repaired else value
    return value


def _unescape(line: bytes | bytearray, start: int, stop: int) -> tuple[bytearray, bool]:
    """Return the UTF-8 of a JSON string, and whether a lone surrogate in it was replaced."""
    text, is_repaired = bytearray(), False
    while start < stop:
        limit = min(start + _PART_BYTES, stop)
        match = _COMPLETE_ESCAPES.match(line, start, limit)
        end = match.end() if match else start
        end = utf8_boundary_before(line, end) if end < stop else end
        if end <= start:  # no complete escape: the parser will report the error
            end = limit
        part = b'"' + line[start:end] + b'"'
        try:
            text += orjson.loads(part).encode()
        except orjson.JSONDecodeError:
            text += orjson.loads(_replace_lone_surrogates(part)).encode()
            is_repaired = True
        start = end
    return text, is_repaired


def parse_line(name: str, numbered: tuple[int, bytes | bytearray | None]) -> tuple[int, dict[str, Any] | str]:
    """Parse a line from `iter_lines`; return the line's number, and the line's object or reject reason.

    `name` is the file's name for messages. Raises InputError if the first line begins a value that spans several lines,
    MemoryError if memory is exhausted.
    """
    number, line = numbered
    if line is None:
        return number, TOO_LONG
    is_long = len(line) > LONG_BYTES
    try:
        value = parse_long_line(line) if is_long else parse_json(line)
    except orjson.JSONDecodeError as error:
        if error.msg.startswith("Not enough memory"):
            raise MemoryError(error.msg) from None  # not rejected, since the row may be valid
        if number == 1 and begins_multiline_json(line):
            command = "jq -c '.[]'" if line.lstrip()[:1] == b"[" else "jq -c ."
            raise InputError(
                f"{name}: JSON over several lines, but one JSON object per line is expected; convert it, for example "
                f"with {command}"
            ) from None
        is_text = is_utf8(memoryview(line)) and b"\0" not in line  # UTF-16 has NUL bytes
        return number, "invalid JSON" if is_text else "not UTF-8 text"
    if is_long and value is None:
        return number, TOO_LONG
    return number, value if isinstance(value, dict) else "not a JSON object"


def begins_multiline_json(line: bytes | bytearray) -> bool:
    """Return whether a line begins an array or an object that continues on the next lines."""
    if line.strip() == b"{":
        return True
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return line.lstrip()[:1] == b"[" and error.msg == "unexpected end of data"
    return False
