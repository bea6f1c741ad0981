"""JSON as RFC 8259 defines it: without NaN and infinity, as valid UTF-8 without a byte order mark.

Python's `json` module is more tolerant by default. This module imports no other module of the package.
"""

import json
import math
from collections.abc import Mapping
from typing import Any


def json_bytes(value: Any) -> bytes:
    """Return a value as the bytes of a JSON file; equal values produce equal bytes. NaN and infinity become null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
    except ValueError:
        text = json.dumps(without_nan(value), ensure_ascii=False, indent=2)
    return f"{text}\n".encode()


def without_nan(value: Any) -> Any:
    """Return a JSON value with null in place of NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON document. Raises ValueError if it is not JSON, not UTF-8 or nested too deeply."""
    try:
        value = json.loads(data.decode(), parse_float=_finite_float, parse_constant=_finite_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if rb"\ud" in data.lower():
        json.dumps(value, ensure_ascii=False).encode()  # fails for a lone surrogate, which UTF-8 cannot represent
    return value


def _finite_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value
