"""The events of a run: their names, categories and text. Pure functions of rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tinyllama.formatting import format_duration_precise

Event = Mapping[str, Any]
Category = Literal["release", "interruption", "problem", "info"]
RELEASE: Category = "release"
INTERRUPTION: Category = "interruption"
PROBLEM: Category = "problem"
INFO: Category = "info"


@dataclass(frozen=True)
class EventKind:
    """Category and presentation of an event."""

    category: Category
    """Release, interruption of training, problem, or other information."""
    level: Literal["info", "warn", "error"]
    """Severity in the trackers' lists of alerts."""
    is_annotated: bool = False
    """Whether trackers draw the event on the loss curve, because the event affects the curve."""
    is_lifecycle: bool = False
    """Whether the event changes the state of the run: active, ended or failed."""


EVENT_KINDS = {
    "start": EventKind(INFO, "info", is_lifecycle=True),
    "resume": EventKind(INTERRUPTION, "info", is_lifecycle=True),
    "signal": EventKind(INTERRUPTION, "warn", is_annotated=True, is_lifecycle=True),
    "interrupted": EventKind(INTERRUPTION, "warn", is_lifecycle=True),
    "done": EventKind(INFO, "info", is_lifecycle=True),
    "failed": EventKind(PROBLEM, "error", is_lifecycle=True),
    "hang": EventKind(PROBLEM, "error", is_lifecycle=True),
    "rank-lost": EventKind(PROBLEM, "error", is_annotated=True, is_lifecycle=True),
    "skip": EventKind(PROBLEM, "warn", is_annotated=True),
    "rollback": EventKind(PROBLEM, "warn", is_annotated=True),
    "checkpoint": EventKind(INFO, "info"),
    "checkpoint-failed": EventKind(PROBLEM, "error"),
    "checkpoint-damaged": EventKind(PROBLEM, "error"),
    "metrics-damaged": EventKind(PROBLEM, "warn"),
    "release": EventKind(RELEASE, "info", is_annotated=True),
    "release-failed": EventKind(PROBLEM, "error"),
    "tracker-failed": EventKind(PROBLEM, "warn"),
    "tracker-blocked": EventKind(PROBLEM, "warn"),
}
"""All kinds of events that training, releases and trackers write, by name."""
_COMMON_FIELDS = ("time", "event", "step")


def event_kind(event: Event) -> EventKind:
    """Return the kind of an event; an unknown event, from another version, has the category `info`."""
    return EVENT_KINDS.get(event["event"], EventKind(INFO, "info"))


def event_category(event: Event) -> Category:
    """Return the category of an event."""
    return event_kind(event).category


def event_title(event: Event) -> str:
    """Return the name and step of an event: `rollback at step 1,200`."""
    return f"{event['event']} at step {event['step']:,}"


def describe_event(event: Event) -> str:
    """Return the details of an event: all fields except its name, step and time."""
    details = {name: value for name, value in event.items() if name not in _COMMON_FIELDS and value is not None}
    return "; ".join(_format_detail(name, value) for name, value in details.items())


def _format_detail(name: str, value: Any) -> str:
    label = name.removesuffix("_seconds").replace("_", " ")
    if name.endswith("seconds"):
        return f"{'took' if name == 'seconds' else label} {format_duration_precise(value)}"
    if name in ("reason", PROBLEM, "signal", "folder"):
        return str(value)
    if isinstance(value, list):
        return f"{label}: {', '.join(map(str, value))}"
    return f"{label} {value}"
