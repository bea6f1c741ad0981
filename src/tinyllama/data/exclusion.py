"""Where a document goes that cleaning takes out: to the caller, once, with the reason.

The caller's writer is asked for nothing but `write`: datatrove's filters enter and leave theirs, each for itself,
which several filters in a row could not do to one writer.
"""

from dataclasses import dataclass
from typing import Any, Protocol, Self

from datatrove.data import Document


class Excluded(Protocol):
    """What counts the documents taken out, by `document.metadata["filter_reason"]`."""

    def write(self, document: Document, rank: int) -> None:
        """Take a document of task `rank` that no later step will see."""


def exclude(document: Document, reason: str, excluded: Excluded, rank: int) -> None:
    """Hand a document over with its reason."""
    document.metadata["filter_reason"] = reason
    excluded.write(document, rank)


@dataclass
class RuleWriter:
    """An `exclusion_writer` for one of datatrove's filters, which puts the filter's name before its reason."""

    rule: str
    excluded: Excluded

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def write(self, document: Document, rank: int) -> None:
        """Hand a document over; datatrove has left the filter's own reason in its metadata."""
        exclude(document, f"{self.rule}: {document.metadata['filter_reason']}", self.excluded, rank)
