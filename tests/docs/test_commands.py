"""Run every block of the documentation, page by page and in order, in a separate folder per page.

rules.py lists what runs with smaller values and what does not run. The output that a page shows after a block must be
printed exactly.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docs import rules, world
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, Block, blocks_of, is_for_another_python, missing_line
from tests.docs.shell import Shell, started

from tinyllama.recipe import Recipe


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with started(tmp_path_factory.mktemp("shell")) as shell:
        yield shell


@pytest.fixture(scope="session")
def prepared(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw text and the output of all stages. Read only."""
    folder = tmp_path_factory.mktemp("world")
    world.write_raw(folder)
    world.build(folder, shell)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first page waits for the fixtures of all pages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    blocks = blocks_of(page)
    unknown = [f"{block.place}: ```{block.language}" for block in blocks if block.language not in LANGUAGES]
    assert not unknown, f"no way to run these; use one of {LANGUAGES}: {unknown}"
    is_set_up = False
    for block in blocks:
        write(block, tmp_path)
        if block.language == "yaml":
            check_recipe(block, tmp_path)
        elif block.language == "json":
            json.loads(block.body)
        elif block.language == "bash" or (block.language == "python" and not block.title):
            if not is_set_up:
                world.copy_for(
                    block.page, request.getfixturevalue("prepared"), tmp_path, request.getfixturevalue("shell")
                )
                is_set_up = True
            run(block, request.getfixturevalue("shell"), tmp_path)


def write(block: Block, folder: Path) -> None:
    """Write a block to the file that the page names, or a snippet to a fixed file."""
    path = folder / (block.title or ".snippet.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"step-\d{8}", rules.STEP, block.body))


def run(block: Block, shell: Shell, folder: Path) -> None:
    """Run a block of shell or Python, and compare its output with the page."""
    before = len(shell.commands())
    is_shell = block.language == "bash"
    script = re.sub(r"step-\d{8}", rules.STEP, block.body) if is_shell else "python --snippet .snippet.py"
    try:
        printed = shell.run(script, folder)
    except AssertionError as error:
        raise AssertionError(f"{block.place}: {error}") from None
    if block.output and not any(command["excluded"] for command in shell.commands()[before:]):
        missing = missing_line(block.output, printed, is_for_another_python(ROOT / block.page))
        assert missing is None, f"{block.place}: the page shows {missing!r}; printed was\n{printed}"


def check_recipe(block: Block, folder: Path) -> None:
    """Load a complete recipe, or a part of one inside a complete recipe."""
    fields = yaml.safe_load(block.body)
    path = folder / ".recipe.yaml"
    if not {"name", "model", "train"} <= fields.keys():
        world.write_recipe(path, "base")
        fields = merged(yaml.safe_load(path.read_text()), from_top(fields))
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    Recipe.load(path)


def from_top(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a recipe from the recipe's top level, with the sources that its mixture schedule names."""
    if part.keys() <= Recipe.model_fields.keys():
        return part
    if not part.keys() & {"sources", "stages", "executor"}:
        part = {"sources": part}
    named = {name for stage in part.get("stages", []) for name in stage["weights"]}
    added = {name: {"format": "text", "path": "raw/manuals", "weight": 1} for name in named}
    return {"data": part | {"sources": added | part.get("sources", {})}}


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return nested mappings with the values of `change`."""
    return base | {
        name: merged(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in change.items()
    }


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
