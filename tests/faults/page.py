"""The matrix of faults, and docs/faults.md made of it: `python -m tests.faults.page`.

Reads matrix.toml, which for every stage and fault has what is promised and the tests that show it, or why there is
nothing to promise, and soak.md, the record of `make soak`.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

STAGES = (
    "tokenizer",
    "prepare",
    "inspect --verify",
    "train",
    "checkpoint",
    "evaluate",
    "release",
    "verify",
    "generate",
    "watch and trackers",
    "report",
    "push",
)
FAULTS = (
    "kill -9",
    "SIGTERM",
    "disk full",
    "no permission",
    "flipped bit",
    "truncated file",
    "clock going back",
    "hung tracker",
    "worker out of memory",
    "rank lost",
)
NONE = "\N{EN DASH}"
HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs/faults.md"
Cell = Mapping[str, Any]


def matrix() -> dict[tuple[str, str], Cell]:
    """Each cell by stage and fault: `promise` and `tests`, or `empty`, why there is none."""
    found = tomllib.loads((HERE / "matrix.toml").read_text())
    return {(stage, fault): cell for stage, faults in found.items() for fault, cell in faults.items()}


def page() -> str:
    """The text of docs/faults.md."""
    return "\n".join([*_head(), *_overview(), *_stages(), (HERE / "soak.md").read_text().rstrip(), ""])


def _head() -> Iterator[str]:
    yield from ("---", "hide: [toc]", "---", "")  # the overview takes the whole width, and leads to the sections
    yield "# Faults: what is promised, and the test that shows it"
    yield ""
    yield (HERE / "faults.md").read_text().rstrip()
    yield ""


def _overview() -> Iterator[str]:
    """Stages down, faults across: how many tests, or a dash."""
    cells = matrix()
    yield f"| | {' | '.join(FAULTS)} |"
    yield "|---" * (len(FAULTS) + 1) + "|"
    for stage in STAGES:
        counts = (str(len(cells[stage, fault].get("tests", []))) for fault in FAULTS)
        yield f"| [{stage}](#{_anchor(stage)}) | {' | '.join(count if count != '0' else NONE for count in counts)} |"
    yield ""


def _anchor(heading: str) -> str:
    return re.sub(r"[-\s]+", "-", heading)


def _stages() -> Iterator[str]:
    cells = matrix()
    for stage in STAGES:
        yield f"## {stage}"
        yield ""
        yield "| fault | promised | shown by |"
        yield "|---|---|---|"
        for fault in FAULTS:
            cell = cells[stage, fault]
            said = cell.get("promise") or f"does not apply: {cell['empty']}"
            yield f"| {fault} | {said} | {'<br>'.join(map(_test, cell.get('tests', [])))} |"
        yield ""


def _test(name: str) -> str:
    file, _, function = name.partition("::")
    return f"`{file.removeprefix('tests/')}`: {function.removeprefix('test_').replace('_', ' ')}"


if __name__ == "__main__":
    PAGE.write_text(page())
