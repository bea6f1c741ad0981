"""Every block of the documentation is executed, page by page and in order, in a folder of the page's own.

What is smaller here than the page says, and what is not carried out, stands in `rules.py`; nothing else is left out.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docs import rules, world
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, Block, blocks_of, lines_missing
from tests.docs.shell import Shell, started

from tinyllama.recipe import Recipe
from tinyllama.recipe_data import Data


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with started(tmp_path_factory.mktemp("shell")) as shell:
        yield shell


@pytest.fixture(scope="session")
def made(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw text and all that the stages made of it. Read only."""
    folder = tmp_path_factory.mktemp("world")
    world.write_raw(folder)
    world.build(folder, shell)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_does_what_the_page_says(
    page: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    blocks = blocks_of(page)
    unknown = [f"{block.place}: ```{block.language}" for block in blocks if block.language not in LANGUAGES]
    assert not unknown, f"no way to run these; give them one of {LANGUAGES}: {unknown}"
    if any(block.language in ("bash", "python") for block in blocks):
        shell = request.getfixturevalue("shell")
        world.copy_for(blocks[0].page, request.getfixturevalue("made"), tmp_path)
        shell.enter(tmp_path)
    for block in blocks:
        printed = execute(block, tmp_path, request)
        missing = lines_missing(block.output, printed) if block.output and printed is not None else None
        assert missing is None, f"{block.place}: the page shows {missing!r}; printed was\n{printed}"


def execute(block: Block, folder: Path, request: pytest.FixtureRequest) -> str | None:
    """Do what a block says; what it printed, where that is the same here as for the page's reader."""
    body = re.sub(r"step-\d{8}", rules.STEP, block.body)
    if block.title:
        path = folder / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
    match block.language:
        case "bash":
            return run(request.getfixturevalue("shell"), body, folder, block)
        case "python" if not block.title:
            (folder / ".snippet.py").write_text(body)
            return run(request.getfixturevalue("shell"), "python --snippet .snippet.py", folder, block)
        case "yaml":
            check_recipe(block, folder)
        case "json":
            for line in [body] if body.lstrip().startswith("{\n") else body.splitlines():
                json.loads(line)
    return None


def run(shell: Shell, script: str, folder: Path, block: Block) -> str | None:
    before = len(shell.commands())
    try:
        printed = shell.run(script, folder)
    except AssertionError as error:
        raise AssertionError(f"{block.place}: {error}") from None
    commands = [entry["command"].split() for entry in shell.commands()[before:]]
    is_small = any(words[0] == "tinyllama" and rules.scaled(words[1:]) != words[1:] for words in commands)
    is_done = not any(entry["entry"] for entry in shell.commands()[before:])
    return printed if is_done and not is_small and script.count("step-") == block.body.count("step-") else None


def check_recipe(block: Block, folder: Path) -> None:
    """A whole recipe loads; a part of one stands in a recipe that loads."""
    fields = yaml.safe_load(block.body)
    path = folder / ".recipe.yaml"
    if not {"name", "model", "train"} <= fields.keys():
        world.write_recipe(path, "base")
        fields = merged(yaml.safe_load(path.read_text()), whole(fields, block))
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    Recipe.load(path)


def whole(part: dict[str, Any], block: Block) -> dict[str, Any]:
    """A part of a recipe, from the recipe's top; sources that its mixes name are added."""
    if not part.keys() - Recipe.model_fields.keys():
        return part
    if not part.keys() - Data.model_fields.keys():
        named = {name for stage in part.get("stages", []) for name in stage["weights"]}
        added = {name: {"format": "text", "path": "raw/manuals", "weight": 1} for name in named}
        return {"data": {"sources": added} | part}
    assert all("format" in value for value in part.values()), f"{block.place}: part of no recipe"
    return {"data": {"sources": part}}


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return base | {
        name: merged(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in change.items()
    }


def test_what_is_not_carried_out_is_carried_out_by_the_test_that_is_named(shell: Shell) -> None:
    for entry in rules.NOT_RUN:
        assert (ROOT / entry.test).is_file(), entry


def test_no_rule_is_left_over() -> None:
    lines = [
        line.strip()
        for page in PAGES
        for block in blocks_of(page)
        if block.language == "bash"
        for line in block.body.splitlines()
    ]
    commands = [re.sub(r"^(\w+=\S+ )*(\.venv/bin/)?", "", line) for line in lines]
    for entry in rules.NOT_RUN:
        assert any(re.match(entry.pattern, command) for command in commands), f"{entry.pattern}: no page names it"


def test_a_line_that_is_not_printed_is_seen() -> None:
    assert lines_missing("a\n…c\n", "a\nb c\n") is None
    assert lines_missing("a\nb\n", "b\na\n") == "b"
    assert lines_missing("loss …, done", "loss 3.1, undone") == "loss …, done"
