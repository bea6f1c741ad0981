"""A run's events as marks on a picture.

Pure functions of the rows of events.jsonl. A run of weeks has thousands: neighbours become one mark, and marks share a
label, so that a picture never has more of them than it has room for.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tinyllama.runs.events import INFO, Event, event_category


@dataclass(frozen=True)
class Annotation:
    """Events of one kind that stand so close together that a picture shows them as one."""

    tokens: float
    """Mean of where they happened."""
    kind: str
    names: Mapping[str, int]
    """Event -> how many."""

    @property
    def count(self) -> int:
        """How many events."""
        return sum(self.names.values())

    @property
    def label(self) -> str:
        """`rollback`, `3 skips`, `4 events`; stops count by what follows each of them, `2 resumes`."""
        names = {"resume": self.names["resume"]} if "resume" in self.names else self.names
        if len(names) > 1:
            return f"{self.count} events"
        ((name, count),) = names.items()
        return name if count == 1 else f"{count} {name}s"


def marks_of(events: Iterable[Event], batch_tokens: int, least_apart: float) -> list[Annotation]:
    """The marks of all events but routine ones; those of a kind are at least `least_apart` tokens from each other."""
    found = (Annotation(event["step"] * batch_tokens, event_category(event), {event["event"]: 1}) for event in events)
    return merge_nearby([mark for mark in found if mark.kind != INFO], least_apart)


def merge_nearby(marks: Sequence[Annotation], least_apart: float) -> list[Annotation]:
    """Marks of a kind that stand less than `least_apart` tokens after the first of their group, as one."""
    groups: list[list[Annotation]] = []
    for mark in sorted(marks, key=lambda mark: (mark.kind, mark.tokens)):
        if groups and groups[-1][0].kind == mark.kind and mark.tokens - groups[-1][0].tokens < least_apart:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    return [_joined(group) for group in groups]


def _joined(group: Sequence[Annotation]) -> Annotation:
    names: Counter[str] = Counter()
    for mark in group:
        names.update(mark.names)
    count = sum(mark.count for mark in group)
    return Annotation(sum(mark.tokens * mark.count for mark in group) / count, group[0].kind, dict(names))
