"""Numbers as people say them, and rows as lines: for progress, plans, pictures, cards and reports.

Pure functions. Three digits are what a reader compares; who needs all of them finds them in the tables and files.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

EM_DASH = "\N{EN DASH}"
"""Stands where a number would, if there were one."""


def format_count(count: float) -> str:
    """A count as people say it: 6.01M, 105B, 3T."""
    rounded = float(f"{count:.3g}")
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if rounded >= size:
            return f"{rounded / size:g}{unit}"
    return f"{rounded:g}"


def format_bytes(count: float) -> str:
    """Bytes in decimal units, as disks are sold: 668 MB, 2.2 GB."""
    rounded = float(f"{count:.3g}")
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if rounded >= size:
            return f"{rounded / size:g} {unit}"
    return f"{rounded:g} bytes"


def duration(seconds: float) -> str:
    """A time in its two largest units: `2 d 3 h`, `4 min 10 s`, `12 s`, `under 1 s`."""
    left = max(0, round(seconds))
    for (large, size), (small, part) in pairwise((("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))):
        if left >= size:
            rest = left % size // part
            return f"{left // size} {large}" + (f" {rest} {small}" if rest else "")
    return f"{left} s" if left else "under 1 s"


def format_duration_precise(seconds: float) -> str:
    """A `duration`, below ten seconds to two digits: 0.35 s."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def format_percent(part: float) -> str:
    """A share in per cent: 97.5 %."""
    return f"{100 * part:.1f}\N{NO-BREAK SPACE}%"


def format_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells, the head's first, as lines of text: each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
