"""The names on the pages exist: commands, flags, files, tests, make targets; and the figures of one example."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.docs.blocks import PAGES, ROOT, blocks_of
from tools.recipe_page import part_of

from tinyllama.cli import COMMANDS
from tinyllama.recipe import Recipe

NAMES = {"code-tour.md": r"[A-Za-z_]\w*|[A-Z]\w*\.\w+", "faq.md": r"test_\w+"}
"""Pattern of the names that a page mentions with their file."""
FILE = re.compile(r"[\w/-]+\.py|tests/[\w/]+")
OTHER_FLAGS = {
    "--help", "--help-all", "--version", "--quiet", "--no-repack", "--no-cache-dir", "--ipc", "--shm-size",
    "--max-restarts", "--signal", "--local-addr", "--nodes", "--shutdown-timeout",
}  # fmt: skip
"""Flags of all commands, and flags of other programs."""


def paragraphs(page: str) -> list[str]:
    """Return table rows, paragraphs and list items as one line each, without fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    joined = re.sub(r"\n(?!\n|\||#|\s*(-|\d+\.) )", " ", text)
    return [re.sub(r" +", " ", line) for line in joined.splitlines() if line.strip()]


def file_named(path: str) -> Path:
    """Return a file from a path that starts at the checkout or at the package."""
    is_from_top = path.startswith(("src/", "tests/", "benchmarks/", "cluster/", "tools/"))
    return ROOT / path if is_from_top else ROOT / "src/tinyllama" / path


def defines(path: Path, name: str) -> bool:
    """Return whether a file defines each part of a dotted name."""
    text = path.read_text()
    parts = name.split(".")
    return all(re.search(rf"^ *((def|class) {part}\b|{part}(:| =))", text, flags=re.MULTILINE) for part in parts)


@pytest.mark.parametrize("page", NAMES)
def test_named_files_and_names_exist(page: str) -> None:
    missing, count = [], 0
    for line in paragraphs(page):
        spans = [span for span in re.findall(r"`([^`\n]+)`", line) if "NAME" not in span]
        files = [file_named(span) for span in spans if FILE.fullmatch(span)]
        missing += [str(file) for file in files if not file.exists()]
        modules = [file for file in files if file.suffix == ".py" and file.exists()]
        names = [span for span in spans if modules and re.fullmatch(NAMES[page], span)]
        count += len(names)
        missing += [f"{name}: {line[:80]}" for name in names if not any(defines(file, name) for file in modules)]
    assert not missing
    assert count > 10


def test_named_make_targets_and_paths_exist() -> None:
    targets = set(re.findall(r"^([\w/.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, text in spans():
        for target in re.findall(r"^make ([a-z][\w-]*)", text):
            assert target in targets, f"{page}: make {target}"
        for path in re.findall(r"(?<![\w/])((?:tests|benchmarks|src/tinyllama)/[\w./-]*\w)(?=[\s,;:)]|$)", text):
            assert (ROOT / path).exists(), f"{page}: {path}"


def spans() -> Iterator[tuple[str, str]]:
    """Yield page and text of each code span and each line of a fenced block, with continued lines joined."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        fenced = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        for line in "\n".join(fenced).splitlines():
            yield page.name, line.partition("  #")[0].strip()
        inline = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`]+)`", inline):
            yield page.name, " ".join(code.split())


def is_field(dotted: str, model: type = Recipe) -> bool:
    """Return whether the recipe has a field; names of sources may be anything."""
    name, _, rest = dotted.partition(".")
    field = model.model_fields.get(name)  # type: ignore[attr-defined]
    if field is None:
        return False
    is_mapping = "dict" in str(field.annotation)
    inner = part_of(field.annotation)
    if not rest or inner is None:
        return not rest or is_mapping
    rest = rest.partition(".")[2] if is_mapping else rest
    return not rest or is_field(rest, inner)


def test_every_command_is_on_a_page() -> None:
    text = " ".join(text for _, text in spans())
    assert not [name for name in COMMANDS if not re.search(rf"tinyllama {name}\b", text)]


def test_every_flag_on_a_page_exists() -> None:
    parameters = {name for command in COMMANDS.values() for name in inspect.signature(command).parameters}
    flags = {f"--{no}{name.replace('_', '-')}" for name in parameters for no in ("", "no-")} | OTHER_FLAGS
    unknown = [
        (page, text, flag)
        for page, text in spans()
        if re.match(r"--|(.*[/ ])?tinyllama ", text) and not text.endswith("|| test $? -eq 2")  # shows an error
        for flag in re.findall(
            r"(?:^|[\s\[])(--[a-z_][\w.-]*)", re.split(r"[|;&]", text.rpartition("tinyllama ")[2])[0]
        )
        if flag not in flags and not is_field(flag.removeprefix("--"))
    ]
    assert not unknown


def test_figures_of_the_continued_run_follow_from_its_recipe(tmp_path: Path) -> None:
    """Steps, tokens and rates follow from the recipe of docs/continue.md; losses are near the end of the demo."""
    blocks = blocks_of(ROOT / "docs/continue.md")
    (tmp_path / "continued.yaml").write_text(next(block.body for block in blocks if block.title == "continued.yaml"))
    recipe = Recipe.load(tmp_path / "continued.yaml")
    train = recipe.train
    rows = [line.split() for block in blocks if block.language == "text" for line in block.body.splitlines()]
    assert [row[0] for row in rows] == ["1", "2", "10", "15", "20"]
    readme = (ROOT / "README.md").read_text()
    loss = re.search(r"at step 1, ([\d.]+) at step \d+", readme)
    bits = re.search(r"\*\*([\d.]+) bits per byte\*\*", readme)
    assert loss
    assert bits
    for step, tokens, rate, row_loss, *validation in rows:
        expected = train.learning_rate_at(int(step) - 1)
        assert (tokens, rate) == (f"{int(step) * train.batch_tokens:,}", f"{expected:.1e}")
        assert bool(validation) == (int(step) % train.validate_every_steps == 0)
        assert float(row_loss) == pytest.approx(float(loss[1]), rel=0.2)
        assert all(float(value) == pytest.approx(float(bits[1]), rel=0.1) for value in validation)
