"""Any text is a recipe or one line that says why not; a recipe survives its own YAML; any words are a call."""

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
from tests.fuzz.mutations import changed, changes, documents, values
from tests.fuzz.properties import few, kept_folder, one_line

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.recipe import Recipe, bundled_recipes, flatten
from tinyllama.recipe.fields import parse_tokens

RECIPES = Path(__file__).parents[2] / "recipes"


@cache
def recipe_bytes(name: str) -> bytes:
    return (RECIPES / f"{name}.yaml").read_bytes()


@cache
def whole(name: str) -> Any:
    return yaml.safe_load(Recipe.load(name).to_yaml())


@cache
def folder() -> Path:
    return kept_folder()


def recipe_of(data: bytes) -> Recipe | None:
    """What a file's bytes are as a recipe; None where one line says why they are none."""
    path = folder() / "recipe.yaml"
    path.write_bytes(data)
    try:
        return Recipe.load(path)
    except InputError as error:
        assert str(error).startswith(str(path))
        one_line(error)
        return None


def check_recipe(data: bytes) -> None:
    """Bytes are a recipe, which then survives its own YAML, or one line."""
    if recipe := recipe_of(data):
        again = recipe_of(recipe.to_yaml().encode())
        assert again == recipe
        assert again.digest == recipe.digest


@few(150)
@given(name=st.sampled_from(bundled_recipes()), todo=changes)
def test_any_bytes_are_a_recipe_or_one_line(name: str, todo: Any) -> None:
    check_recipe(changed(recipe_bytes(name), todo))


TEN = ",".join(["*b{0}"] * 10)
BOMB = "a: &b0 [x]\n" + "".join(f"a{n}: &b{n + 1} [{TEN.format(n)}]\n" for n in range(12)) + "name: *b12\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: x\nseed: 2026-13-01",
            ":2: not valid YAML: '2026-13-01' is not a valid timestamp; put a text in quotes",
        ),
        ("seed: 0x_", ":1: not valid YAML: '0x_' is not a valid int"),
        (f"seed: {'9' * 5000}", ":1: not valid YAML: '999"),
        ("seed: !!bool x", ":1: not valid YAML: 'x' is not a valid bool"),
        ("name: !!map [a]", ":1: not valid YAML: expected a mapping"),
        ("[" * 3000, ": not valid YAML: nested too deeply"),
        ('name: "\\ud800"', ":1: not valid YAML: '\\ud800' contains half of a surrogate pair"),
        ("name: a\x07", ": not valid YAML: character U+0007 at 7; remove it"),
        (BOMB, ": name: [[[[...], "),  # 10^12 lists, were they written out
    ],
)
def test_what_yaml_s_own_loader_stumbles_over_is_one_short_line(text: str, said: str) -> None:
    """Found 2026-11-24: a traceback each, and of the last one hours of writing it out."""
    (folder() / "recipe.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        Recipe.load(folder() / "recipe.yaml")
    one_line(error.value)
    assert str(error.value).startswith(f"{folder() / 'recipe.yaml'}{said}")


def test_a_field_s_name_with_a_line_s_end_is_named_on_one_line() -> None:
    """Found 2026-11-24: the message had two lines."""
    with pytest.raises(InputError, match=r"'a\\nb': unknown field") as error:
        Recipe.load("demo", {"a\nb": 1})
    one_line(error.value)


@few(150)
@given(fields=st.sampled_from(bundled_recipes()).flatmap(lambda name: documents(whole(name))))
def test_any_fields_are_a_recipe_or_one_line(fields: Any) -> None:
    check_recipe(yaml.safe_dump(fields, allow_unicode=True).encode("utf-8", "surrogatepass"))


@few(100)
@given(
    name=st.sampled_from([*sorted(flatten(whole("demo"))), "name.x", "data", "data.sources", "x", "", "a..b"]),
    value=values,
)
def test_any_override_is_taken_or_one_line(name: str, value: Any) -> None:
    try:
        recipe = Recipe.load("demo", {name: value})
    except InputError as error:
        one_line(error)
    else:
        check_recipe(recipe.to_yaml().encode())


@few(200)
@example(text="_0")  # found 2026-11-24: "could not convert string to float"
@given(
    text=st.text(max_size=12) | st.from_regex(r"[0-9_]{0,4}\.?[0-9]{0,4}(e[0-9]{1,4})?\s?[KMBTkmbt]?", fullmatch=True)
)
def test_a_count_of_tokens_is_a_whole_number_or_refused_in_words(text: str) -> None:
    try:
        count = parse_tokens(text)
    except ValueError as error:
        assert str(error).startswith(("is not a count of tokens", "is more than"))
    else:
        assert isinstance(count, int)
        assert 0 <= count <= 10**18


def _doing_nothing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def nothing(*_: object, **__: object) -> int:
        return 0

    return nothing


CALLS = {name: _doing_nothing(function) for name, function in cli.COMMANDS.items()}
OPTIONS = [
    "--help",
    "-h",
    "--quiet",
    "--",
    "--step",
    "--formats",
    "--json",
    "--set",
    "--train.tokens",
    "--model.layers",
]
OPTIONS += [
    "--data.sources",
    "--data.sources.x.path",
    "--max-new-tokens",
    "--temperature",
    "--port",
    "--no-open-browser",
]
words = st.lists(
    st.sampled_from([*" ".join(CALLS).split(), *bundled_recipes(), *OPTIONS, "3T", "1", "null", "{a: 1", "[1, 2]"])
    | st.tuples(st.sampled_from(OPTIONS), st.text(max_size=5)).map("=".join)
    | st.text(max_size=8),
    max_size=6,
)


def check_words(given_words: list[str]) -> None:
    """A command line runs, or is refused with status 2 and one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "COMMANDS", CALLS)
        out, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            status = cli.main(given_words)
    assert status in (0, 2)
    assert said.getvalue().count("\n") == (status == 2)
    assert said.getvalue().startswith("tinyllama: ") == (status == 2)


@few(60)
@example(given_words=["train", "demo", "--data.sources", "{a: 2026-13-01}"])  # found 2026-11-24: a traceback
@given(
    given_words=st.tuples(st.sampled_from(sorted(CALLS)).map(str.split), words).map(lambda two: two[0] + two[1]) | words
)
def test_any_words_are_a_call_or_one_line(given_words: list[str]) -> None:
    check_words(given_words)


def seeds() -> list[bytes]:
    return [recipe_bytes(name) for name in bundled_recipes()]
