"""What the pages show of a plan or a schedule is what the command or the snippet above it prints."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from tinyllama import cli

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PURE = re.compile(r"tinyllama\.(plan|train\.schedule)")


def shown() -> list[tuple[str, str, str]]:
    """Page, code and output of each command and snippet whose output is the same on any machine."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        for (language, code), (following, text) in pairwise(FENCE.findall(page.read_text())):
            is_pure = code.startswith("tinyllama plan") if language == "bash" else bool(PURE.search(code))
            if is_pure and following == "text":
                found.append((page.name, code, text))
    return found


def printed(code: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    if code.startswith("tinyllama "):
        words = shlex.split(code.replace("\\\n", " ").partition("|")[0])
        cli.main(words[1:])
    else:
        exec(compile(code, "snippet", "exec"), {})
    both = capsys.readouterr()
    return [line.rstrip() for line in (both.out + both.err).splitlines()]


@pytest.mark.parametrize(("page", "code", "text"), shown())
def test_a_page_shows_what_the_plan_prints(
    page: str, code: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = iter(printed(code, capsys))
    missing = next((line for line in text.splitlines() if line.rstrip() not in lines), None)  # in this order
    assert missing is None, f"{page}: {missing!r} is not printed there by {code}"


def test_both_pages_of_plans_are_held_against_them() -> None:
    assert {"scale.md", "tinyllama-run.md"} <= {page for page, _, _ in shown()}
