"""Check for idioms that readers have misunderstood in the project's text; part of `make check`.

The check reads tracked text files and prints `file:line: idiom; replacement` for each match. The exit status is 1 if
there is a match.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = (
    ".py",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
    ".html",
    ".sh",
    ".sbatch",
    ".cff",
    ".jinja",
    ".css",
    "Makefile",
    ".ci/run",
)
EXCLUDED = ("docs/assets/", "docs/log.md", "requirements.lock", "tools/idioms.py", "tests/suite/")
REPLACEMENTS = {
    "gone? on": "resume, continue",
    "(?:goes|went|going) on": "resume, continue",
    "(?:goes|went|going) back to (?:its|the) (?:last|newest)": "roll back",
    "left[- ]out": "skipped, dropped, excluded",
    "leaves out": "skips, omits",
    "in vain": "without effect",
    "nothing but": "only",
    "for ever": "permanently",
    "beside (?:training|the run|it|its|them)": "next to, alongside, compared with",
    "others' weights": "external weights",
    "for want of": "out of, without",
    "what there is": "name what it is",
    "stands? in": "is in",
    "stands? (?:beside|above|below|there)": "is",
    "as it is told": "as configured",
    "is told": "is configured, receives",
    "whole or not at all": "atomically",
    "of such a one": "repeat the noun",
    "a second time": "again, twice",
    "lies? beside": "is next to",
    "the whole way": "all stages",
}
"""Patterns of idioms, matched as whole words in any case, and what to write instead."""
_ALTERNATIVES = [rf"(?P<i{n}>\b{idiom}\b)".replace(" ", r"\s+") for n, idiom in enumerate(REPLACEMENTS)]
PATTERN = re.compile("|".join(_ALTERNATIVES), re.IGNORECASE)


def find_idioms(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, idiom and replacement of each match; an idiom may continue on the next line."""
    # Replace a line break and a comment sign by the same number of spaces, so that positions do not change.
    joined = re.sub(r"(?<=\w)\n[ #]*(?=\w)", lambda match: " " * len(match[0]), text)
    for match in PATTERN.finditer(joined):
        number = int(str(match.lastgroup)[1:])
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), list(REPLACEMENTS.values())[number]


def main() -> int:
    """Print all matches and return the exit status."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = 0
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if name.endswith(SUFFIXES) and not name.startswith(EXCLUDED) and path.is_file():
            for line, idiom, replacement in find_idioms(path.read_text(encoding="utf-8", errors="replace")):
                print(f"{name}:{line}: {idiom!r}; write: {replacement}")
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
