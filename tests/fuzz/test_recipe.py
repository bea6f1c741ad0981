"""Any text is a recipe or a one-line error; a recipe written as YAML is read as the same recipe; likewise arguments."""

import contextlib
import functools
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from tests.fuzz.strategies import (
    assert_one_line,
    edited,
    edited_documents,
    edits_of_bytes,
    fixed_examples,
    shared_folder,
    values,
)

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.recipe import Recipe, bundled_recipes, flatten
from tinyllama.recipe.loading import parse_tokens

RECIPES = Path(__file__).parents[2] / "recipes"


@cache
def valid_fields(name: str) -> Any:
    return yaml.safe_load(Recipe.load(name).to_yaml())


@cache
def recipe_folder() -> Path:
    return shared_folder()


def recipe_of(data: bytes) -> Recipe | None:
    """Return the recipe in a file's bytes; None if it causes a one-line error."""
    path = recipe_folder() / "recipe.yaml"
    path.write_bytes(data)
    try:
        return Recipe.load(path)
    except InputError as error:
        assert str(error).startswith(str(path))
        assert_one_line(error)
        return None


def check_recipe(data: bytes) -> None:
    """Check that bytes are a recipe, which is the same after it is written as YAML and read, or a one-line error."""
    if recipe := recipe_of(data):
        again = recipe_of(recipe.to_yaml().encode())
        assert again == recipe
        assert again.digest == recipe.digest


@fixed_examples(150)
@given(name=st.sampled_from(bundled_recipes()), edits=edits_of_bytes)
def test_any_bytes_are_a_recipe_or_refused(name: str, edits: Any) -> None:
    check_recipe(edited((RECIPES / f"{name}.yaml").read_bytes(), edits))


TEN = ",".join(["*b{0}"] * 10)
BOMB = "a: &b0 [x]\n" + "".join(f"a{n}: &b{n + 1} [{TEN.format(n)}]\n" for n in range(12)) + "name: *b12\n"


@pytest.mark.parametrize(
    ("text", "place", "keyword"),
    [
        ("name: x\nseed: 2026-13-01", ":2: ", "not a valid timestamp"),
        ("seed: 0x_", ":1: ", "not a valid int"),
        (f"seed: {'9' * 5000}", ":1: ", "'999"),
        ("seed: !!bool x", ":1: ", "not a valid bool"),
        ("name: !!map [a]", ":1: ", "expected a mapping"),
        ("[" * 3000, ": ", "nested too deeply"),
        ('name: "\\ud800"', ":1: ", "surrogate"),
        ("name: a\x07", ": ", "U+0007"),
        (BOMB, ": name: ", "[[[[..."),  # 10^12 lists if expanded
    ],
)
def test_yaml_that_crashes_its_loader_is_refused(text: str, place: str, keyword: str) -> None:
    """Found 2026-11-24: each gave a traceback; the last one took hours to format."""
    (recipe_folder() / "recipe.yaml").write_text(text + "\n")
    with pytest.raises(InputError) as error:
        Recipe.load(recipe_folder() / "recipe.yaml")
    assert_one_line(error.value)
    assert str(error.value).startswith(f"{recipe_folder() / 'recipe.yaml'}{place}")
    assert keyword in str(error.value)


def test_field_name_with_newline_is_refused() -> None:
    """Found 2026-11-24: the message had two lines."""
    with pytest.raises(InputError, match=r"'a\\nb': unknown field") as error:
        Recipe.load("demo", {"a\nb": 1})
    assert_one_line(error.value)


@fixed_examples(150)
@given(fields=st.sampled_from(bundled_recipes()).flatmap(lambda name: edited_documents(valid_fields(name))))
def test_any_fields_are_a_recipe_or_refused(fields: Any) -> None:
    check_recipe(yaml.safe_dump(fields, allow_unicode=True).encode("utf-8", "surrogatepass"))


@fixed_examples(100)
@given(
    name=st.sampled_from([*sorted(flatten(valid_fields("demo"))), "name.x", "data", "data.sources", "x", "", "a..b"]),
    value=values,
)
def test_any_override_is_accepted_or_refused(name: str, value: Any) -> None:
    try:
        recipe = Recipe.load("demo", {name: value})
    except InputError as error:
        assert_one_line(error)
    else:
        check_recipe(recipe.to_yaml().encode())


@fixed_examples(200)
@example(text="_0")  # found 2026-11-24: "could not convert string to float"
@given(
    text=st.text(max_size=12) | st.from_regex(r"[0-9_]{0,4}\.?[0-9]{0,4}(e[0-9]{1,4})?\s?[KMBTkmbt]?", fullmatch=True)
)
def test_token_count_is_an_integer_or_a_clear_error(text: str) -> None:
    try:
        count = parse_tokens(text)
    except ValueError as error:
        assert str(error).startswith(("is not a count of tokens", "is more than"))
    else:
        assert isinstance(count, int)
        assert 0 <= count <= 10**18


def _no_operation(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def no_operation(*_: object, **__: object) -> int:
        return 0

    return no_operation


CALLS = {name: _no_operation(function) for name, function in cli.COMMANDS.items()}
# fmt: off
OPTIONS = [
    "--help", "-h", "--quiet", "--", "--step", "--formats", "--json", "--set", "--train.tokens", "--model.layers",
    "--data.sources", "--data.sources.x.path", "--max-new-tokens", "--temperature", "--port", "--no-browser",
]
# fmt: on
argument_lists = st.lists(
    st.sampled_from([*" ".join(CALLS).split(), *bundled_recipes(), *OPTIONS, "3T", "1", "null", "{a: 1", "[1, 2]"])
    | st.tuples(st.sampled_from(OPTIONS), st.text(max_size=5)).map("=".join)
    | st.text(max_size=8),
    max_size=6,
)


@fixed_examples(60)
@example(arguments=["train", "demo", "--data.sources", "{a: 2026-13-01}"])  # found 2026-11-24: a traceback
@given(
    arguments=st.tuples(st.sampled_from(sorted(CALLS)).map(str.split), argument_lists).map(lambda two: two[0] + two[1])
    | argument_lists
)
def test_any_arguments_are_a_call_or_refused(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "COMMANDS", CALLS)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(arguments)
    assert status in (0, 2)
    assert err.getvalue().count("\n") == (status == 2)
    assert err.getvalue().startswith("tinyllama: ") == (status == 2)
