"""Every file, function and test that the pages for contributors and the questions name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = {"code-tour.md": r"[A-Za-z_]\w*|[A-Z]\w*\.\w+", "faq.md": r"test_\w+"}
"""By page, what is a name: the questions have commands and fields in the same type."""
SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w/-]+\.py|tests/[\w/]+")


def paragraphs(page: str) -> list[str]:
    """Rows of tables, and paragraphs and points of lists as one line each; no blocks of code."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    joined = re.sub(r"\n(?!\n|\||#|\s*(-|\d+\.) )", " ", text)
    return [re.sub(r" +", " ", line) for line in joined.splitlines() if line.strip()]


def file_named(path: str) -> Path:
    """A path of the page's: from the checkout's top, or within the package."""
    return (
        ROOT / path if path.startswith(("src/", "tests/", "benchmarks/", "cluster/")) else ROOT / "src/tinyllama" / path
    )


def defines(path: Path, name: str) -> bool:
    """Whether a file defines each part of a name: as a function, a class, a constant or a field."""
    text = path.read_text()
    return all(
        re.search(rf"^ *((def|class) {part}\b|{part}(:| =))", text, flags=re.MULTILINE) for part in name.split(".")
    )


@pytest.mark.parametrize("page", NAMES)
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    spans = [span for line in paragraphs(page) for span in SPAN.findall(line)]
    gone = [span for span in spans if FILE.fullmatch(span) and "NAME" not in span and not file_named(span).exists()]
    assert not gone


@pytest.mark.parametrize("page", NAMES)
def test_every_name_beside_a_file_is_defined_in_one_of_the_files_beside_it(page: str) -> None:
    wrong, seen = [], 0
    for line in paragraphs(page):
        spans = SPAN.findall(line)
        files = [
            file_named(span) for span in spans if span.endswith(".py") and FILE.fullmatch(span) and "NAME" not in span
        ]
        names = [span for span in spans if files and re.fullmatch(NAMES[page], span)]
        seen += len(names)
        wrong += [f"{name}: {line[:80]}" for name in names if not any(defines(file, name) for file in files)]
    assert not wrong
    assert seen > 10
