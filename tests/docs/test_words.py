"""What the pages say of the command line exists, and what exists is said on some page."""

import inspect
import re
from collections.abc import Iterator

import pytest
from tests.docs.blocks import PAGES, ROOT
from tools.recipe_page import part_of

from tinyllama.cli import COMMANDS
from tinyllama.recipe import Recipe
from tinyllama.recipe.fields import RecipeModel

OTHERS = {"--help", "--quiet"}
FOREIGN = {
    "--no-repack", "--no-cache-dir", "--ipc", "--shm-size", "--max-restarts", "--signal",
    "--local-addr", "--nodes", "--shutdown-timeout",
}  # fmt: skip
"""Flags of other programs that stand alone on a page."""


def spans() -> Iterator[tuple[str, str]]:
    """Page and text of each piece of code, a command's lines joined."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        fenced = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        for line in "\n".join(fenced).splitlines():
            yield page.name, line.partition("  #")[0].strip()
        inline = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`]+)`", inline):
            yield page.name, " ".join(code.split())


def flags_of(name: str) -> set[str]:
    """A command's own flags."""
    names = [parameter.replace("_", "-") for parameter in inspect.signature(COMMANDS[name]).parameters]
    return {f"--{no}{flag}" for flag in names for no in ("", "no-")}


def is_a_field(dotted: str, model: type[RecipeModel] = Recipe) -> bool:
    """Whether the recipe has such a field; a source's name and the like may be anything."""
    name, _, rest = dotted.partition(".")
    field = model.model_fields.get(name)
    if field is None:
        return False
    inner = part_of(field.annotation)
    if not rest or inner is None:
        return not rest or "dict" in str(field.annotation)
    rest = rest.partition(".")[2] if "dict" in str(field.annotation) else rest
    return not rest or is_a_field(rest, inner)


def test_every_command_is_described() -> None:
    said = " ".join(text for _, text in spans())
    missing = [name for name in COMMANDS if not re.search(rf"tinyllama {name}\b", said)]
    assert not missing


def test_no_page_names_a_command_or_a_flag_that_does_not_exist() -> None:
    anywhere = set().union(*map(flags_of, COMMANDS)) | OTHERS | FOREIGN
    for page, text in spans():
        if text.endswith("|| test $? -eq 2"):  # it shows what is refused
            continue
        for call in re.findall(r"(?:^|.*[/ ])tinyllama ([a-z][^|;&]*)", text):
            words = call.split()
            name = " ".join(words[: 2 if words[0] == "tokenizer" else 1])
            if name in COMMANDS:
                has_recipe = "recipe" in COMMANDS[name].__annotations__
                check_flags(page, call, flags_of(name) | OTHERS, has_recipe)
        for flag in re.findall(r"^(--[\w.-]+)", text):
            check_flags(page, flag, anywhere, takes_fields=True)


def check_flags(page: str, call: str, known: set[str], takes_fields: bool) -> None:
    for flag in re.findall(r"(?:^|[\s\[])(--[a-z_][\w.-]*)", call):
        is_known = flag in known or (takes_fields and is_a_field(flag.removeprefix("--")))
        assert is_known, f"{page}: `{call}`: there is no {flag}"


@pytest.mark.parametrize(
    ("flag", "exists"),
    [
        ("train.tokens", True),
        ("train.tokns", False),
        ("data.sources.mine.weight", True),
        ("data.sources.mine.wait", False),
    ],
)
def test_a_field_that_a_recipe_lacks_is_seen(flag: str, exists: bool) -> None:
    assert is_a_field(flag) is exists


def test_targets_and_tests_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([\w/.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, text in spans():
        for target in re.findall(r"^make ([a-z][\w-]*)", text):
            assert target in targets, f"{page}: make {target}"
        for path in re.findall(r"(?<![\w/])((?:tests|benchmarks|src/tinyllama)/[\w./-]*\w)(?=[\s,;:)]|$)", text):
            assert (ROOT / path).exists(), f"{page}: {path}"
