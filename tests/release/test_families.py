"""The families of Llamas in docs/formats.md are read and released in every format; other models are refused."""

import re
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import contents, small_recipe
from tests.release.families import FAMILIES, write_family
from tests.vocabularies import BYTES, trained_byte_level, write_byte_level
from tokenizers import pre_tokenizers

from tinyllama import cli
from tinyllama.api import evaluate_model, generate_text, release_run, train_model
from tinyllama.files import read_json, write_json
from tinyllama.loading import HuggingFaceLlama
from tinyllama.prepare.pipeline import build_store
from tinyllama.recipe import Recipe
from tinyllama.release.convert import ALL_FORMATS
from tinyllama.release.verify import verify_release

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs/formats.md"


@pytest.fixture(scope="module")
def tokenizers(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    words = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
    trained_byte_level().save(folder / "llama3")
    return {
        "llama2": small / "tokenizer",
        "llama3": folder / "llama3",
        "smollm": write_byte_level(folder / "smollm", words),
    }


@pytest.fixture(scope="module")
def stores(small: Path, tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Token stores of the small text by the kind of tokenizer."""
    folder, found = tmp_path_factory.mktemp("stores"), {"llama2": small / "store"}
    for kind in tokenizers.keys() - found:
        fields = small_recipe(small) | {"tokenizer": str(tokenizers[kind])}
        fields["data"] |= {"store": str(folder / kind)}
        build_store(Recipe.model_validate(fields))
        found[kind] = folder / kind
    return found


def initial_weights_recipe(small: Path, model: Path, tokenizer: Path, store: Path) -> Recipe:
    """Return a recipe of one step that starts from the weights of a model."""
    fields = small_recipe(small)
    fields |= {"tokenizer": str(tokenizer), "model": HuggingFaceLlama.open(model).config.model_dump()}
    fields["data"] |= {"store": str(store)}
    fields["train"] |= {"tokens": 6 * 64, "initial_weights": str(model), "schedule": {"warmup_steps": 1}}
    fields["train"]["schedule"] |= {"final_learning_rate": 3e-4}
    return Recipe.model_validate(fields)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_read_and_released_in_every_format(
    small: Path,
    tokenizers: dict[str, Path],
    stores: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    model, kind = write_family(tmp_path / "model", name, tokenizers), FAMILIES[name][0]
    assert generate_text(model, "def f", 5).startswith("def f")
    scores = evaluate_model(model, "hellaswag", limit=2, precision="fp32")
    assert scores is not None and scores.scores["hellaswag"]
    released = release_run(model).path
    checks = verify_release(released)
    assert [check for check in checks if not check.passed] == []
    assert {check.subject for check in checks} == {
        "files", "source", "huggingface", "gguf F16", "gguf Q8_0", "gguf Q4_K_M", "ctranslate2 float32",
        "ctranslate2 int8",
    }  # fmt: skip
    run = train_model(initial_weights_recipe(small, model, tokenizers[kind], stores[kind]))
    trained = release_run(run, formats=ALL_FORMATS if name == "Llama 3.2" else ["huggingface"])
    shapes = [HuggingFaceLlama.open(folder).config for folder in (model, released, trained.path)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_page_lists_the_tested_families() -> None:
    table = re.search(r"^\| model \|.*\n\|[-| ]+\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE)
    assert table is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
    assert [row[0] for row in rows] == list(FAMILIES)
    assert {cell for row in rows for cell in row[-4:]} == {"yes"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("llama4_text", {"model_type": "llama4_text"}),
    ],
)
def test_every_command_refuses_another_model_before_anything_is_written(
    small: Path,
    tokenizers: dict[str, Path],
    stores: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: dict[str, Any],
) -> None:
    """`tests/test_loading.py` has the other fields that are refused."""
    monkeypatch.chdir(tmp_path)
    config = write_family(tmp_path / "model", "Llama 3.2", tokenizers) / "config.json"
    write_json(config, read_json(config) | change)
    (tmp_path / "recipe.yaml").write_text(
        Recipe.model_validate(small_recipe(small) | {"tokenizer": str(tokenizers["llama3"])}).to_yaml()
    )
    before = contents(tmp_path)
    capsys.readouterr()
    for command in (
        ["release", "model"],
        ["generate", "model", "text"],
        ["train", "recipe.yaml", "--train.initial_weights", "model", "--data.store", str(stores["llama3"])],
        ["prepare", "recipe.yaml", "--train.initial_weights", "model", "--data.store", "store"],
    ):
        assert cli.main(command) == 2, command
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(r"tinyllama: model: config\.json: ", line) and name in line, line
    assert contents(tmp_path) == before
