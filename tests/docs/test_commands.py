"""Run every block of the documentation, page by page and in order, in a separate folder per page.

rules.py lists what runs with smaller values and what does not run. The output that a page shows after a block must be
printed exactly.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docs import rules
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, Block, blocks_of, is_for_another_python, missing_line
from tests.docs.reader_folder import copy_for, run_stages, write_raw, write_recipe
from tests.docs.shell import Shell

from tinyllama.recipe import Recipe, flatten

NOTEBOOK = "tutorial.md"
"""Page whose Python blocks use the names of earlier blocks."""
CELL_END = "\f"


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell.start(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="session")
def prepared(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw text and the output of all stages. Read only."""
    folder = tmp_path_factory.mktemp("prepared")
    write_raw(folder)
    run_stages(folder, shell)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first page waits for the fixtures of all pages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, prepared: Path, shell: Shell, tmp_path: Path) -> None:
    copy_for(page.relative_to(ROOT).as_posix(), prepared, tmp_path, shell)
    if page.name == NOTEBOOK:
        run_notebook(blocks_of(page), shell, tmp_path)
        return
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block.place}: no way to run this; use one of {LANGUAGES}"
        path = tmp_path / (block.title or ".snippet.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(re.sub(r"step-\d{8}", rules.STEP, block.body))
        if block.language == "yaml":
            check_recipe(block, tmp_path)
        elif block.language == "json":
            json.loads(block.body)
        elif block.language == "bash":
            run(block, path.read_text(), shell, tmp_path)
        elif block.language == "python" and not block.title:
            run(block, "python --snippet .snippet.py", shell, tmp_path)


def run(block: Block, script: str, shell: Shell, folder: Path) -> None:
    """Run a script, and compare its output with the page unless a rule excludes one of its commands."""
    try:
        printed = shell.run(script, folder)
    except AssertionError as error:
        raise AssertionError(f"{block.place}: {error}") from None
    if block.output and rules.EXCLUDED_MARK not in printed:
        compare(block, block.output, printed)


def compare(block: Block, output: str, printed: str) -> None:
    missing = missing_line(output, printed, is_for_another_python(ROOT / block.page))
    assert missing is None, f"{block.place}: the page shows {missing!r}; printed was\n{printed}"


def run_notebook(blocks: Sequence[Block], shell: Shell, folder: Path) -> None:
    """Write the files of a page, then run its Python blocks in one process, as in a notebook."""
    for block in blocks:
        if block.title:
            (folder / block.title).write_text(block.body)
    cells = [block for block in blocks if block.language == "python" and not block.title]
    (folder / ".snippet.py").write_text("".join(f"{cell.body}print(end={CELL_END!r})\n" for cell in cells))
    printed = shell.run("python --snippet .snippet.py", folder).split(CELL_END)
    assert len(printed) == len(cells) + 1
    for cell, own in zip(cells, printed[:-1], strict=True):
        if cell.output:
            compare(cell, cell.output, own)


def check_recipe(block: Block, folder: Path) -> None:
    """Load a complete recipe, or a part of one inside a complete recipe."""
    fields = yaml.safe_load(block.body)
    path = folder / ".recipe.yaml"
    if {"name", "model", "train"} <= fields.keys():
        path.write_text(block.body)
        Recipe.load(path)
    else:
        write_recipe(path, "base")
        Recipe.load(path, flatten(from_top(fields)))


def from_top(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a recipe from the recipe's top level, with the sources that its mixture schedule names."""
    if part.keys() <= Recipe.model_fields.keys():
        return part
    if not part.keys() & {"sources", "stages", "executor"}:
        part = {"sources": part}
    named = {name for stage in part.get("stages", []) for name in stage["weights"]}
    added = {name: {"format": "text", "path": "raw/manuals", "weight": 1} for name in named}
    return {"data": part | {"sources": added | part.get("sources", {})}}


def test_every_rule_matches_a_command_of_a_page() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page) if block.language == "bash"]
    lines = [line.strip() for block in blocks for line in block.body.splitlines()]
    commands = [re.sub(r"^(\w+=\S+ )*(\.venv/bin/)?", "", line) for line in lines]
    unused = [rule.pattern for rule in rules.EXCLUDED if not any(re.match(rule.pattern, line) for line in commands)]
    assert not unused


def test_a_missing_line_of_output_is_found() -> None:
    assert missing_line("a\n…c\n", "a\nb c\n") is None
    assert missing_line("a\nb\n", "b\na\n") == "b"
    assert missing_line("loss …, done", "loss 3.1, undone") == "loss …, done"
    assert missing_line("  12,000 tokens", "  7 tokens", other_numbers=True) is None
    assert missing_line("  12,000 tokens", "  7 rows", other_numbers=True) == "  12,000 tokens"
    assert missing_line("  12,000 tokens", "  12,001 tokens") == "  12,000 tokens"
