"""Size and documentation of the library; part of `make check`.

The output lists the lines of code per package, and modules of fewer than 40 lines. The exit status is 1 if a file has
more than 400 lines or a public name has no docstring. Blank lines, comments and docstrings do not count as lines of
code.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[1] / "src/tinyllama"
TARGET_CODE_LINES, TARGET_MODULES = 9_000, 95  # printed, not enforced
MAX_FILE_LINES, SHORT_FILE_LINES = 400, 40
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """One file of the library."""

    name: str
    lines: int
    code_lines: int
    functions: int
    public_names: int
    undocumented: list[str]


def main() -> int:
    """Print the measures and return the exit status."""
    modules = [measure(path) for path in sorted(SOURCE.rglob("*.py"))]
    packages: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        packages[module.name.partition("/")[0] if "/" in module.name else "(top)"].append(module)
    for package, members in sorted(packages.items()):
        print(f"{package:<12} {len(members):>4} files {sum(module.code_lines for module in members):>7,} lines of code")
    code = sum(module.code_lines for module in modules)
    size = f"{code:,} lines of code (target {TARGET_CODE_LINES:,}) in {len(modules)} files (target {TARGET_MODULES})"
    print(f"library: {size}")
    print(f"functions: {sum(module.functions for module in modules):,}")
    print(f"public names with a docstring: {sum(module.public_names for module in modules):,}")
    short = [module.name for module in modules if module.lines < SHORT_FILE_LINES and module.lines > 1]
    print(f"files of under {SHORT_FILE_LINES} lines: {', '.join(short) or 'none'}")
    failures = [f"{module.name}: {name} has no docstring" for module in modules for name in module.undocumented]
    failures += [
        f"{module.name}: {module.lines} lines, more than {MAX_FILE_LINES}; split it"
        for module in modules
        if module.lines > MAX_FILE_LINES
    ]
    print("\n".join(failures), end="\n" if failures else "")
    return 1 if failures else 0


def measure(path: Path) -> Module:
    """Return the measures of a file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions = sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    members = [node for scope in (tree, *classes) for node in scope.body if isinstance(node, Definition)]
    public = [node for node in members if not node.name.startswith("_")]
    undocumented = [node.name for node in public if ast.get_docstring(node) is None]
    name = path.relative_to(SOURCE).as_posix()
    return Module(name, text.count("\n"), count_code_lines(text, tree), functions, len(public), undocumented)


def count_code_lines(text: str, tree: ast.Module) -> int:
    """Return the number of lines that are not blank, a comment, or a docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in docstrings for number, line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
