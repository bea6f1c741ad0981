"""Every block of the documentation is executed, page by page and in order, in a folder of the page's own.

What is smaller here than the page says, and what is not carried out, stands in `rules.py`; nothing else is left out.
What a page shows right behind a block has to be printed to the letter, numbers too.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import names_of_tests
from tests.docs import rules, world
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, Block, blocks_of, is_of_another_python, lines_missing
from tests.docs.fragments import check_recipe
from tests.docs.shell import Shell, started


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


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first page waits for what all pages find
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_does_what_the_page_says(
    page: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    blocks = blocks_of(page)
    unknown = [f"{block.place}: ```{block.language}" for block in blocks if block.language not in LANGUAGES]
    assert not unknown, f"no way to run these; give them one of {LANGUAGES}: {unknown}"
    given: list[str] = []
    for block in blocks:
        write_down(block, tmp_path)
        if block.language == "yaml":
            check_recipe(block, tmp_path)
        elif block.language == "json":
            json.loads(block.body)
        elif block.language == "bash" or (block.language == "python" and not block.title):
            if not given:
                world.copy_for(block.page, request.getfixturevalue("made"), tmp_path, request.getfixturevalue("shell"))
            given += run(block, request.getfixturevalue("shell"), tmp_path)


def write_down(block: Block, folder: Path) -> None:
    """Write a block to the file that the page tells its reader to write it to, a snippet to one of its own."""
    path = folder / (block.title or ".snippet.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"step-\d{8}", rules.STEP, block.body))


def run(block: Block, shell: Shell, folder: Path) -> list[str]:
    """Run a block of shell or Python and hold what it prints against the page; the commands that were given."""
    before = len(shell.commands())
    script = (
        re.sub(r"step-\d{8}", rules.STEP, block.body) if block.language == "bash" else "python --snippet .snippet.py"
    )
    try:
        printed = shell.run(script, folder)
    except AssertionError as error:
        raise AssertionError(f"{block.place}: {error}") from None
    commands = shell.commands()[before:]
    given = [entry["command"] for entry in commands]
    if block.output and not any(entry["entry"] for entry in commands):
        missing = lines_missing(block.output, printed, is_of_another_python(ROOT / block.page))
        assert missing is None, f"{block.place}: the page shows {missing!r}; printed was\n{printed}"
    return given or ["none"]


def test_what_is_not_carried_out_has_the_test_that_is_named_or_the_reason_for_none() -> None:
    for entry in rules.NOT_RUN:
        assert entry.why, entry
        if entry.test is not None:
            file, _, function = entry.test.partition("::")
            assert function in names_of_tests(file), entry


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
    assert lines_missing("  12,000 tokens", "  7 tokens", of_other_text=True) is None
    assert lines_missing("  12,000 tokens", "  7 rows", of_other_text=True) == "  12,000 tokens"
    assert lines_missing("  12,000 tokens", "  12,001 tokens") == "  12,000 tokens"
