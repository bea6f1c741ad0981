"""Generator of docs/commands.md, the reference of all commands; run by `make docs`.

The generator reads the commands' signatures and docstrings, from which `--help` is also made. A test compares the page
in the repository with the output.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tinyllama.cli import GROUPS
from tinyllama.cli.arguments import Command, describe, usage
from tinyllama.cli.help import option_rows, positional_rows

PAGE = Path(__file__).parents[1] / "docs/commands.md"
INTRODUCTION = """\
# Commands

This page lists every command with its arguments and options. [The command line](command-line.md) describes completion,
output as JSON and exit statuses. A command that takes a recipe also accepts each [field of the recipe](recipe.md) as an
option, such as `--train.tokens 20M`. Each command has `--help`; `--quiet` hides its progress.

`make docs` generates this page from the program.
"""


def page() -> str:
    """Return the page as Markdown."""
    sections = (section(name, command) for group in GROUPS.values() for name, command in group.items())
    contents = [f"- {group}: {', '.join(map(link, commands))}" for group, commands in GROUPS.items()]
    return "\n".join([INTRODUCTION, *contents, "", *("\n".join(lines) for lines in sections)])


def link(name: str) -> str:
    """Return a link to a command's section."""
    return f"[{name}](#tinyllama-{name.replace(' ', '-')})"


def section(name: str, command: Command) -> Iterator[str]:
    """Yield the lines of a command's section: purpose, usage, examples, and a table of arguments and options."""
    description = describe(name, command)
    yield from (f"## `tinyllama {name}`", "", " ".join(filter(None, (description.summary, description.details))), "")
    yield from ("```text", usage(name, description), "```", "")
    if description.examples:
        yield from ("Examples:", "", "```text", *description.examples, "```", "")
    rows = [*positional_rows(name, description), *option_rows(description)]
    if rows:
        yield from table(rows)


def table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield the lines of a table of arguments."""
    yield from ("| argument | meaning |", "|---|---|")
    for term, text in rows:
        yield f"| `{term}` | {text.replace('|', chr(92) + '|')} |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
