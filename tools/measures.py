"""The measures that the project keeps an eye on: lines, functions, files, docstrings. Part of `make check`.

Reads the library's source; exit status 1 where a file or a function is over its bound. Lines of code are those that
hold a token that is neither comment nor docstring.

    python tools/measures.py
"""

import ast
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parent.parent / "src" / "tinyllama"
MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 50
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """One file of the library."""

    name: str
    lines: int
    code: int
    functions: list[tuple[str, int]]  # name and lines, the docstring's included


def main() -> int:
    """Print the measures and return the exit status."""
    modules = [read(path) for path in sorted(SOURCE.rglob("*.py"))]
    print("\n".join(table(modules)))
    over = list(over_bounds(modules))
    print("\n".join(over), end="\n" if over else "")
    return 1 if over else 0


def read(path: Path) -> Module:
    """Measure a file."""
    text = path.read_text()
    tree = ast.parse(text)
    functions = [(node.name, length(node)) for node in ast.walk(tree) if isinstance(node, Function)]
    return Module(str(path.relative_to(SOURCE)), text.count("\n"), len(lines_of_code(text, tree)), functions)


def lines_of_code(text: str, tree: ast.Module) -> set[int]:
    """The numbers of the lines that are neither blank, nor comment, nor text that stands for itself."""
    said = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    words = {line for node in said for line in range(node.lineno, length(node) + node.lineno)}
    lines = enumerate(text.splitlines(), 1)
    return {number for number, line in lines if line.strip() and line.strip()[0] != "#" and number not in words}


def length(node: ast.stmt) -> int:
    """Lines from a statement's first to its last."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def table(modules: list[Module]) -> Iterator[str]:
    """The measures, one a line."""
    rooms: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        rooms[module.name.partition("/")[0] if "/" in module.name else "(top)"].append(module)
    for room, inside in sorted(rooms.items()):
        yield f"{room:<12} {len(inside):>4} files {sum(module.code for module in inside):>7,} lines of code"
    lengths = [lines for module in modules for _, lines in module.functions]
    longest = max(modules, key=lambda module: module.lines)
    yield f"{'library':<12} {len(modules):>4} files {sum(module.code for module in modules):>7,} lines of code"
    yield f"longest file: {longest.name}, {longest.lines} lines (at most {MOST_FILE_LINES})"
    yield (
        f"functions: {len(lengths):,}, median {statistics.median(lengths):.0f} lines, "
        f"{sum(lines > 15 for lines in lengths)} over 15, longest {max(lengths)} (at most {MOST_FUNCTION_LINES})"
    )


def over_bounds(modules: list[Module]) -> Iterator[str]:
    """What is too long, one a line."""
    for module in modules:
        if module.lines > MOST_FILE_LINES:
            yield f"{module.name}: {module.lines} lines, over {MOST_FILE_LINES}; give a part of it a file of its own"
        for name, lines in module.functions:
            if lines > MOST_FUNCTION_LINES:
                yield f"{module.name}: {name}: {lines} lines, over {MOST_FUNCTION_LINES}; let it call its parts"


if __name__ == "__main__":
    sys.exit(main())
