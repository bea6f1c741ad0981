"""Fenced blocks of a page: language, file name, body and expected output."""

import platform
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.docs.rules import RECORDED

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in RECORDED),
]
"""Pages whose blocks run, and whose names must exist."""
LANGUAGES = ("bash", "python", "yaml", "json", "text", "mermaid")
"""Allowed languages; `text` is output or a command that does not run, `mermaid` a diagram."""

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block; `title` is the file that a reader writes, `output` its expected output."""

    page: str
    line: int
    language: str
    title: str | None
    body: str
    output: str | None = None

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page in order, each with the `text` block that directly follows it."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    found = list(_FENCE.finditer(text))
    blocks = []
    for match, following in pairwise([*found, None]):
        assert match is not None
        is_next = following and not text[match.end() : following.start()].strip()
        output = _body(following) if is_next and following and following["info"].strip() == "text" else None
        language, _, rest = match["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(Block(name, line, language, title and title[1], _body(match), output))
    return blocks


def _body(match: re.Match[str]) -> str:
    return re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE)


def is_for_another_python(page: Path) -> bool:
    """Return whether a page shows the counts of another Python version than this one."""
    named = re.search(r"Python (\d+\.\d+\.\d+)", page.read_text(encoding="utf-8"))
    return named is not None and named[1] != platform.python_version()


def missing_line(output: str, printed: str, other_numbers: bool = False) -> str | None:
    """Return the first line of `output` that was not printed in this order; `…` matches anything.

    With `other_numbers`, numbers and the spaces around them may differ.
    """
    lines = iter([line.rstrip() for line in printed.splitlines()])
    for wanted in filter(None, (line.rstrip() for line in output.splitlines())):
        pattern = ".*".join(map(re.escape, wanted.split("…")))
        if other_numbers:
            pattern = re.sub(r"(\\ )+", r"\\s+", re.sub(r"\d([\d,]|\\\.\d)*", r"\\d[\\d,.]*", pattern))
        if not any(re.fullmatch(pattern, line) for line in lines):
            return wanted
    return None
