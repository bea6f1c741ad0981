"""Check of a command's JSON output against the keys in docs/command-line.md."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

PAGE = Path(__file__).parents[2] / "docs/command-line.md"


def documented_keys(command: str) -> set[str]:
    """Return the keys in the table below a command's heading; `runs[].step` is a key of the members of a list."""
    (section,) = re.findall(rf"^### {command}\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return {key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall("`(.*?)`", row)}


def read_documented_json(command: str, text: str, exact: bool = True) -> Any:
    """Return strict JSON that has the documented keys and, if `exact`, no others."""
    result = json.loads(text, parse_constant=_refuse)
    found, documented = {*_keys(result)}, documented_keys(command)
    assert documented - found == set()
    assert not exact or found - documented == set()
    return result


def _keys(result: dict[str, Any]) -> Iterator[str]:
    for key, value in result.items():
        if isinstance(value, list) and value and all(isinstance(member, dict) for member in value):
            yield from (f"{key}[].{inner}" for member in value for inner in member)
        else:
            yield key


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")
