"""JSON that only tolerant parsers accept is refused, and equal values give equal bytes that any parser reads."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama.strict_json import json_bytes, parse_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)


@given(VALUES)
def test_written_value_is_read_again(value: Any) -> None:
    data = json_bytes(value)
    assert parse_json(data) == value
    assert parse_json(json.dumps(value).encode()) == value  # with escapes
    assert json_bytes(parse_json(data)) == data
    assert data.endswith(b"\n")


def test_nan_and_infinity_become_null() -> None:
    assert parse_json(json_bytes({"a": [math.nan, 1.5, (math.inf, "x")], "b": -math.inf})) == {
        "a": [None, 1.5, [None, "x"]],
        "b": None,
    }


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{'a': 1}",
        b"[1,]",
        b"[NaN]",
        b"[-Infinity]",
        b"[1e999]",
        b'["\xff"]',
        b'["\\ud800"]',
        b'["\\uDC00\\uD800"]',
        b"\xef\xbb\xbf[]",
        "[]".encode("utf-16"),
        b'["\xed\xa0\x80"]',
        b"[" * 100_000 + b"]" * 100_000,
        b"1" * 5000,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_invalid_json_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(data)


def test_surrogate_pair_is_one_character() -> None:
    assert parse_json(b'["\\ud83d\\ude00", "\\\\ud800"]') == ["😀", "\\ud800"]
