"""Pieces of Markdown that a card is made of."""

import re
from collections.abc import Iterable

from tinyllama.formatting import visible


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [map(_cell, head), ("---",) * len(head), *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    """Escape a cell: control characters, `<` outside code, `|` and newlines."""
    escaped = re.sub(r"(`[^`]*`)|<", lambda found: found[1] or "&lt;", visible(text))
    return escaped.replace("|", "\\|").replace("\n", " ")
