"""Marks of a chart: the non-routine events of a run. Nearby events of the same category share a mark."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tinyllama.runs.log import (
    INFO,
    INTERRUPTION,
    PROBLEM,
    RELEASE,
    Category,
    Event,
    event_category,
    event_text,
)

CATEGORIES: dict[Category, str] = {
    PROBLEM: "skipped, rolled back or failed",
    INTERRUPTION: "stopped by a signal, resumed",
    RELEASE: "release",
}
"""Legend of each category of marks, the lowest track first."""
_MAX_WORDS = 6
"""Maximum number of events whose words one mark shows."""


@dataclass(frozen=True)
class Mark:
    """One or several nearby events of a category."""

    tokens: float
    """Mean position of the events."""
    category: Category
    names: Mapping[str, int]
    """Number of events by name."""
    words: tuple[str, ...] = ()
    """Title and details of each event, for at most _MAX_WORDS events."""

    @property
    def count(self) -> int:
        """Number of events."""
        return sum(self.names.values())

    @property
    def label(self) -> str:
        """Text of the mark, such as `rollback`, `3 skips` or `4 events`.

        If some events are named `resume`, only those are counted, because a stop and a resume are one interruption.
        """
        names = {"resume": self.names["resume"]} if "resume" in self.names else self.names
        if len(names) > 1:
            return f"{self.count} events"
        ((name, count),) = names.items()
        return name if count == 1 else f"{count} {name}s"

    @property
    def text(self) -> str:
        """Words of the events, one line per event."""
        hidden = self.count - len(self.words)
        return "\n".join([*self.words, *([f"and {hidden:,} more"] if hidden else [])])


def marks_of(events: Iterable[Event], batch_tokens: int, min_distance: float) -> list[Mark]:
    """Return marks for all non-routine events, merged as described in `merge_nearby`."""
    found = [
        Mark(event["step"] * batch_tokens, event_category(event), {event["event"]: 1}, (event_text(event),))
        for event in events
        if event_category(event) != INFO
    ]
    return merge_nearby(found, min_distance)


def merge_nearby(found: Sequence[Mark], min_distance: float) -> list[Mark]:
    """Merge marks of the same category if the first and the last are less than `min_distance` tokens apart."""
    groups: list[list[Mark]] = []
    for mark in sorted(found, key=lambda mark: (mark.category, mark.tokens)):
        first = groups[-1][0] if groups else None
        if first and first.category == mark.category and mark.tokens - first.tokens < min_distance:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    merged = []
    for group in groups:
        names: Counter[str] = Counter()
        for mark in group:
            names.update(mark.names)
        tokens = sum(mark.tokens * mark.count for mark in group) / names.total()
        words = tuple(words for mark in group for words in mark.words)[:_MAX_WORDS]
        merged.append(Mark(tokens, group[0].category, dict(names), words))
    return merged
