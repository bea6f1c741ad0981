"""What `tinyllama doctor` prints: tables of what was found, or JSON; and its exit status.

The columns are `what`, `found` and `remedy`, with a mark before them; colours only on a terminal.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama.formatting import echo, visible
from tinyllama.plan.checks import CheckResult, machine_rows
from tinyllama.plan.recipe_checks import recipe_rows
from tinyllama.plan.system_info import probe
from tinyllama.recipe import Recipe

_COLOURS = {"ok": "green", "warning": "yellow", "missing": "bold red"}


def show_doctor(recipe: Recipe | None, as_json: bool) -> int:
    """Print what this machine has, and what a recipe would miss; exit status 1 where something is missing."""
    found = probe()
    rows = machine_rows(found) + (recipe_rows(recipe, found) if recipe else [])
    missing = [row.what for row in rows if row.mark == "missing"]
    if as_json:
        told = {"machine": asdict(found), "rows": [asdict(row) for row in rows], "missing": missing}
        echo(json.dumps(told | {"recipe": recipe.name if recipe else None}, indent=2))
    else:
        print_rows(rows, Console(width=None if sys.stdout.isatty() else 160, highlight=False))
        echo(verdict(recipe.name if recipe else None, rows))
    return 1 if missing else 0


def print_rows(rows: Sequence[CheckResult], console: Console) -> None:
    """Print a table for each part, in their order."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "what", "found", "remedy"):
        table.add_column(name, overflow="fold", no_wrap=name in ("", "what"))
    part = None
    for row in rows:
        if row.part != part:
            part = row.part
            table.add_row("", Text(part, style="bold"))
        cells = [Text(visible(text)) for text in (f"  {row.what}", row.found, row.remedy)]
        table.add_row(Text(row.mark, style=_COLOURS[row.mark]), *cells)
    console.print(table)


def verdict(recipe: str | None, rows: Sequence[CheckResult]) -> str:
    """The last line: whether the recipe can go on here."""
    missing = [row.what for row in rows if row.mark == "missing"]
    subject = f"{recipe}: " if recipe else ""
    if missing:
        return f"\n{subject}missing: {', '.join(missing)}"
    warnings = sum(row.mark == "warning" for row in rows)
    return f"\n{subject}nothing is missing" + (f"; warnings: {warnings}" if warnings else "")
