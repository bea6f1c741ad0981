"""What the fuzzed properties share: how many examples a test tries, and what a refusal looks like.

The tests try the same examples each time; `make fuzz` looks for new ones.
"""

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings

from tinyllama.errors import InputError


def few(examples: int) -> settings:
    """Settings of a test that tries so many examples, always the same."""
    slow = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(slow)
    )


def one_line(error: InputError) -> None:
    """A refusal is one line that a terminal can show, and not a page long."""
    text = str(error)
    assert text.strip()
    assert len(text.splitlines()) == 1, text
    assert len(text) < 2000, text
    text.encode()


def kept_folder() -> Path:
    """A folder that is removed when the process ends: for what takes long to make, or is written thousands of times."""
    _kept.append(tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-"))
    return Path(_kept[-1].name)


_kept: list[tempfile.TemporaryDirectory[str]] = []
