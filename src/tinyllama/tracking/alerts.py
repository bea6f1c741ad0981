"""A run's events in words: what the trackers' lists of alerts say, and which are worth a mark on the loss.

Pure functions of rows of events.jsonl. A mark is for what changes how a curve reads; checkpoints and resumes do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinyllama.runs.events import describe_event

MARKED = ("release", "rollback", "skip", "signal", "rank-lost")
"""Events that are drawn on the loss."""
_ERRORS = ("hang", "rank-lost", "failed", "release-failed", "checkpoint-failed", "checkpoint-damaged")
_WARNINGS = ("skip", "rollback", "signal", "interrupted", "tracker-failed", "tracker-blocked")


@dataclass(frozen=True)
class Alert:
    """An event for a list that people read."""

    title: str
    text: str
    level: str
    """`info`, `warn` or `error`, as trackio and W&B call them."""


def alert_of(event: Mapping[str, Any]) -> Alert:
    """An event in words."""
    name = event["event"]
    level = "error" if name in _ERRORS else "warn" if name in _WARNINGS else "info"
    return Alert(f"{name} at step {event['step']:,}", describe_event(event), level)


def is_annotated(event: Mapping[str, Any]) -> bool:
    """Whether an event is drawn on the loss."""
    return event["event"] in MARKED
