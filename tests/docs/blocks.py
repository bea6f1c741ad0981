"""The fenced blocks of a page: what language each is in, what it is called, and what it is said to print."""

import platform
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
LANGUAGES = ("bash", "python", "yaml", "json", "text")
"""What a block can be; `text` is output or a drawing, and anything else than these has no way to be run."""

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block; `title` is the file that a reader writes it to, `output` what the page says that it prints."""

    page: str
    line: int
    language: str
    title: str | None
    body: str
    output: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """A page's blocks in order, each with the block of text that stands right behind it."""
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


def is_of_another_python(page: Path) -> bool:
    """Whether a page counts texts of a Python that it names, and which is not the one here."""
    named = re.search(r"Python (\d+\.\d+\.\d+)", page.read_text(encoding="utf-8"))
    return named is not None and named[1] != platform.python_version()


def lines_missing(output: str, printed: str, of_other_text: bool = False) -> str | None:
    """The first line of `output` that is not printed, in this order; `…` stands for anything.

    Of another text than the page's the numbers and the room for them are others.
    """
    lines = iter([line.rstrip() for line in printed.splitlines()])
    for wanted in filter(None, (line.rstrip() for line in output.splitlines())):
        pattern = ".*".join(map(re.escape, wanted.split("…")))
        if of_other_text:
            pattern = re.sub(r"(\\ )+", r"\\s+", re.sub(r"\d([\d,]|\\\.\d)*", r"\\d[\\d,.]*", pattern))
        if not any(re.fullmatch(pattern, line) for line in lines):
            return wanted
    return None
