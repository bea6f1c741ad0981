"""Generator of docs/faults.md: `python -m tests.faults.page`.

Reads the introduction `faults.md`, the fault matrix `matrix.toml` and the record of `make soak`, `soak.md`.
The matrix has one cell per stage and fault: a promise and its tests, or the reason why the fault does not apply.
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
    "SIGTERM, Ctrl-C",
    "disk full",
    "no permission",
    "flipped bit",
    "truncated file",
    "clock set back",
    "hung tracker",
    "worker out of memory",
    "rank lost",
)
NONE = "\N{EN DASH}"
HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs/faults.md"
Cell = Mapping[str, Any]


def read_matrix() -> dict[tuple[str, str], Cell]:
    """Return the cells by stage and fault. A cell has `promise` and `tests`, or the reason as `empty`."""
    rows = tomllib.loads((HERE / "matrix.toml").read_text())
    return {(stage, fault): cell for stage, faults in rows.items() for fault, cell in faults.items()}


def page() -> str:
    """Return the text of docs/faults.md."""
    head = ["---", "hide: [toc]", "---", ""]  # the table needs the full width and links to the sections
    head += ["# Faults: promises and tests", "", (HERE / "faults.md").read_text().rstrip()]
    return "\n".join([*head, "", *_overview(), *_stages(), (HERE / "soak.md").read_text().rstrip(), ""])


def _overview() -> Iterator[str]:
    """Yield the lines of a table with the number of tests per stage and fault, or a dash for none."""
    cells = read_matrix()
    yield f"| | {' | '.join(FAULTS)} |"
    yield "|---" * (len(FAULTS) + 1) + "|"
    for stage in STAGES:
        counts = (str(len(cells[stage, fault].get("tests", []))) for fault in FAULTS)
        anchor = re.sub(r"[-\s]+", "-", stage)
        yield f"| [{stage}](#{anchor}) | {' | '.join(count if count != '0' else NONE for count in counts)} |"
    yield ""


def _stages() -> Iterator[str]:
    cells = read_matrix()
    for stage in STAGES:
        yield from (f"## {stage}", "", "| fault | promise | tests |", "|---|---|---|")
        for fault in FAULTS:
            cell = cells[stage, fault]
            promise = cell.get("promise") or f"does not apply: {cell['empty']}"
            yield f"| {fault} | {promise} | {'<br>'.join(map(_test, cell.get('tests', [])))} |"
        yield ""


def _test(name: str) -> str:
    file, _, function = name.partition("::")
    return f"`{file.removeprefix('tests/')}`: {function.removeprefix('test_').replace('_', ' ')}"


if __name__ == "__main__":
    PAGE.write_text(page())
