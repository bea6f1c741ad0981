"""A run's events, told apart by what they mean to a reader, and in words. Pure functions of rows of events.jsonl."""

from collections.abc import Mapping
from typing import Any

from tinyllama.words import short_duration

Event = Mapping[str, Any]

RELEASE, PAUSE, TROUBLE, ROUTINE = "release", "pause", "trouble", "routine"
"""What an event is to a reader: a milestone, training that stood still and went on, something wrong, or neither."""

_KINDS = {
    "release": RELEASE,
    "resume": PAUSE,
    "signal": PAUSE,
    "interrupted": PAUSE,
    "start": ROUTINE,
    "checkpoint": ROUTINE,
    "done": ROUTINE,
    "skip": TROUBLE,
    "rollback": TROUBLE,
    "failed": TROUBLE,
    "hang": TROUBLE,
    "rank-lost": TROUBLE,
}
_TROUBLED = ("-failed", "-damaged", "-lost", "-blocked")
_OF_EVERY_EVENT = ("time", "event", "step")


def kind_of(event: Event) -> str:
    """What an event is to a reader."""
    name = event["event"]
    return _KINDS.get(name, TROUBLE if name.endswith(_TROUBLED) else ROUTINE)


def in_words(event: Event) -> str:
    """What an event says besides its name, step and time."""
    details = {name: value for name, value in event.items() if name not in _OF_EVERY_EVENT and value is not None}
    return "; ".join(_detail(name, value) for name, value in details.items())


def _detail(name: str, value: Any) -> str:
    words = name.removesuffix("_seconds").replace("_", " ")
    if name.endswith("seconds"):
        return f"{'took' if name == 'seconds' else words} {short_duration(value)}"
    if name in ("reason", "problem", "signal", "folder"):
        return str(value)
    if isinstance(value, list):
        return f"{words}: {', '.join(map(str, value))}"
    return f"{words} {value}"
