"""Where a document goes that cleaning takes out: to the caller, once, with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from datatrove.data import Document

DropCallback = Callable[[Document], None]
"""Is called with each document that no later step will see; the reason is its `metadata["filter_reason"]`."""


def drop_document(document: Document, reason: str, on_excluded: DropCallback) -> None:
    """Hand a document over with its reason."""
    document.metadata["filter_reason"] = reason
    on_excluded(document)


@dataclass
class DroppedDocumentWriter:
    """An `exclusion_writer` for one of datatrove's filters, which puts the filter's name before its reason.

    Each filter enters and leaves its own, which several in a row could not do to one writer.
    """

    rule: str
    on_excluded: DropCallback

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def write(self, document: Document, rank: int) -> None:
        """Hand a document over; datatrove has left the filter's own reason in its metadata."""
        drop_document(document, f"{self.rule}: {document.metadata['filter_reason']}", self.on_excluded)
