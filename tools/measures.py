"""The measures that the project keeps an eye on: lines, functions, files, docstrings. Part of `make check`.

Reads the library's source; exit status 1 where a file or a function is over its bound, the median function is, or a
public name has no docstring. A line of code is one that is neither blank, nor comment, nor docstring.

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
WANTED_LINES = 5_000  # not kept: CONTRIBUTING.md says what the lines are for
MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 50
MEDIAN_FUNCTION_LINES = 15
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """One file of the library."""

    name: str
    lines: int
    code: int
    functions: list[tuple[str, int]]  # name and lines, the docstring's included
    silent: list[str]  # public names without a docstring
    public: int


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
    public = public_names(tree)
    silent = [node.name for node in public if ast.get_docstring(node) is None]
    name, code = str(path.relative_to(SOURCE)), len(lines_of_code(text, tree))
    return Module(name, text.count("\n"), code, functions, silent, len(public))


def public_names(tree: ast.Module) -> list[ast.ClassDef | Function]:
    """The public functions and classes of a module, and such classes' public methods."""
    top = [node for node in tree.body if isinstance(node, ast.ClassDef | Function)]
    inside = [node for owner in top if isinstance(owner, ast.ClassDef) for node in owner.body if is_shown(owner)]
    return [node for node in [*top, *inside] if isinstance(node, ast.ClassDef | Function) and is_shown(node)]


def is_shown(node: ast.ClassDef | Function) -> bool:
    """Whether a name is public."""
    return not node.name.startswith("_")


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
    longest = max(modules, key=lambda module: module.lines)
    lengths = lengths_of(modules)
    public, silent = sum(module.public for module in modules), sum(len(module.silent) for module in modules)
    code = sum(module.code for module in modules)
    yield f"{'library':<12} {len(modules):>4} files {code:>7,} lines of code (wanted: {WANTED_LINES:,})"
    yield f"longest file: {longest.name}, {longest.lines} lines (at most {MOST_FILE_LINES})"
    yield (
        f"functions: {len(lengths):,}, median {statistics.median(lengths):.0f} lines "
        f"(at most {MEDIAN_FUNCTION_LINES}), {sum(map(MEDIAN_FUNCTION_LINES.__lt__, lengths))} longer than that, "
        f"longest {max(lengths)} (at most {MOST_FUNCTION_LINES})"
    )
    yield f"public names with a docstring: {public - silent:,} of {public:,} (all)"


def lengths_of(modules: list[Module]) -> list[int]:
    """Lines of each function."""
    return [lines for module in modules for _, lines in module.functions]


def over_bounds(modules: list[Module]) -> Iterator[str]:
    """What is too long, one a line."""
    if statistics.median(lengths_of(modules)) > MEDIAN_FUNCTION_LINES:
        yield f"half of the functions are longer than {MEDIAN_FUNCTION_LINES} lines; let them call their parts"
    for module in modules:
        yield from (f"{module.name}: {name} has no docstring" for name in module.silent)
        if module.lines > MOST_FILE_LINES:
            yield f"{module.name}: {module.lines} lines, over {MOST_FILE_LINES}; give a part of it a file of its own"
        for name, lines in module.functions:
            if lines > MOST_FUNCTION_LINES:
                yield f"{module.name}: {name}: {lines} lines, over {MOST_FUNCTION_LINES}; let it call its parts"


if __name__ == "__main__":
    sys.exit(main())
