"""A run's events, told apart by what they mean to a reader, and in words. Pure functions of rows of events.jsonl."""

from collections.abc import Mapping
from typing import Any

from tinyllama.formatting import format_duration_precise

Event = Mapping[str, Any]

RELEASE, INTERRUPTION, PROBLEM, INFO = "release", "pause", "trouble", "routine"
"""What an event is to a reader: a milestone, training that stood still and went on, something wrong, or neither."""

_KINDS = {
    "release": RELEASE,
    "resume": INTERRUPTION,
    "signal": INTERRUPTION,
    "interrupted": INTERRUPTION,
    "start": INFO,
    "checkpoint": INFO,
    "done": INFO,
    "skip": PROBLEM,
    "rollback": PROBLEM,
    "failed": PROBLEM,
    "hang": PROBLEM,
    "rank-lost": PROBLEM,
}
_PROBLEM_SUFFIXES = ("-failed", "-damaged", "-lost", "-blocked")
_COMMON_FIELDS = ("time", "event", "step")


def event_category(event: Event) -> str:
    """What an event is to a reader."""
    name = event["event"]
    return _KINDS.get(name, PROBLEM if name.endswith(_PROBLEM_SUFFIXES) else INFO)


def describe_event(event: Event) -> str:
    """What an event says besides its name, step and time."""
    details = {name: value for name, value in event.items() if name not in _COMMON_FIELDS and value is not None}
    return "; ".join(_detail(name, value) for name, value in details.items())


def _detail(name: str, value: Any) -> str:
    words = name.removesuffix("_seconds").replace("_", " ")
    if name.endswith("seconds"):
        return f"{'took' if name == 'seconds' else words} {format_duration_precise(value)}"
    if name in ("reason", "problem", "signal", "folder"):
        return str(value)
    if isinstance(value, list):
        return f"{words}: {', '.join(map(str, value))}"
    return f"{words} {value}"
