"""Text for people: printable text, short numbers and durations, and tables of aligned columns.

This module imports only `strict_json` from the package. Only `format_table` imports rich.
"""

import contextlib
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from tinyllama.strict_json import without_nan

if TYPE_CHECKING:
    from rich.text import Text

MISSING = "\N{EN DASH}"
"""Placeholder for a missing number."""

# C0 and C1 controls except tab and newline, line separators, characters that change the direction of text, and lone
# surrogates, which no stream can encode.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Replace each control character of a text, except newlines and tabs, with an escape such as `\x1b`."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def quote(text: str) -> str:
    r"""Return a text in double quotes on one line, with quotes, newlines and control characters escaped: `"a\n"`."""
    return visible(json.dumps(text, ensure_ascii=False))


def echo(text: object = "", to_stderr: bool = False) -> None:
    """Print a text and a newline, with control characters escaped, and flush the stream."""
    print(visible(str(text)), file=sys.stderr if to_stderr else sys.stdout, flush=True)


def print_json(value: object) -> None:
    """Print a value as indented JSON in ASCII; a number that is not finite, which JSON does not have, becomes null."""
    echo(json.dumps(without_nan(value), indent=2, allow_nan=False))


@contextlib.contextmanager
def stdout_to_stderr(enabled: bool = True) -> Iterator[None]:
    """Write what libraries print in the block to standard error, if enabled, so that only the result is on stdout."""
    with contextlib.redirect_stdout(sys.stderr) if enabled else contextlib.nullcontext():
        yield


def format_count(count: float) -> str:
    """Format a count with three significant digits and a unit: `6.01M`, `105B`, `3T`."""
    return _with_unit(count, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)), "")


def format_bytes(count: float) -> str:
    """Format a number of bytes with three significant digits and a decimal unit: `668 MB`, `2.2 GB`."""
    return _with_unit(count, ((" TB", 1e12), (" GB", 1e9), (" MB", 1e6), (" kB", 1e3)), " bytes")


def _with_unit(count: float, units: Iterable[tuple[str, float]], smallest_unit: str) -> str:
    rounded = float(f"{count:.3g}")
    for unit, size in units:
        if rounded >= size:
            return f"{rounded / size:g}{unit}"
    return f"{rounded:g}{smallest_unit}"


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units: `2 d 3 h`, `4 min 10 s`, `12 s`, `under 1 s`."""
    left = max(0, round(seconds))
    for (large, size), (small, part) in pairwise((("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))):
        if left >= size:
            rest = left % size // part
            return f"{left // size} {large}" + (f" {rest} {small}" if rest else "")
    return f"{left} s" if left else "under 1 s"


def format_duration_precise(seconds: float) -> str:
    """Format a duration like `format_duration`, but with two significant digits below ten seconds: `0.35 s`."""
    return format_duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def format_percent(fraction: float) -> str:
    """Format a fraction as a percentage: `97.5 %`."""
    return f"{100 * fraction:.1f}\N{NO-BREAK SPACE}%"


def format_score(value: float, stderr: float | None = None, spec: str = ".2f") -> str:
    """Format a score and its standard error: `43.50 ± 0.49`. The default `spec` is for scores in per cent."""
    return f"{value:{spec}}" + ("" if stderr is None else f" ± {stderr:{spec}}")


def format_table(
    head: Sequence[str],
    rows: "Iterable[Sequence[str | Text]]",
    *,
    title: str = "",
    right: Collection[str] = (),
    max_width: int | None = None,
) -> list[str]:
    """Format a table of aligned columns and return its lines.

    Columns are left-aligned, except those whose head is in `right`. If `head` consists of empty strings, no head is
    shown. On a terminal, cells wrap at the terminal's width, and styled `Text` cells become ANSI sequences, which
    `echo` would escape. Title and head have no style. Elsewhere cells wrap at `max_width` characters, or not at all if
    `max_width` is None.
    """
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max_width or 1_000_000
    table = Table(
        title=title and Text(visible(title)), title_justify="left", title_style="", header_style="", box=None,
        pad_edge=False, show_header=any(head),
    )  # fmt: skip
    table.padding = (0, 2, 0, 0)
    for name in head:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) if isinstance(cell, str) else cell for cell in row))
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]
