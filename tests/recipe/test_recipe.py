"""Recipes: fields, overrides, errors and the digest."""

import pickle
import re
import shlex
from pathlib import Path

import pytest

from tinyllama.cli.arguments import extract_overrides
from tinyllama.errors import InputError
from tinyllama.model.flops import flops_per_token, num_parameters
from tinyllama.recipe import Recipe, bundled_recipes


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipe_round_trips_through_yaml(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "copy.yaml") == recipe


def test_command_loads_the_recipe_and_its_overrides_again(tmp_path: Path) -> None:
    overrides = {"train.tokens": "5M", "release.tasks": ["a b", "c'd"], "train.compile": False, "track.wandb": None}
    path = tmp_path / "my recipe.yaml"
    path.write_text(Recipe.load("demo").to_yaml())
    recipe = Recipe.load(path, overrides)
    assert recipe.command("tokenizer train").startswith(f"tinyllama tokenizer train '{path}' --train.tokens 5M ")
    program, _, source, *flags = shlex.split(recipe.command("prepare"))
    own, read = extract_overrides(flags)
    assert (program, source, own) == ("tinyllama", str(path), [])
    assert Recipe.load(source, read) == recipe


def test_origin_of_a_recipe_changes_no_comparison_and_no_copy(tmp_path: Path) -> None:
    (tmp_path / "copy.yaml").write_text(Recipe.load("demo").to_yaml())
    recipe, bundled = Recipe.load(tmp_path / "copy.yaml", {"seed": 1337}), Recipe.load("demo")
    built = Recipe.model_validate(bundled.model_dump())
    assert built.command("train") == "tinyllama train demo"
    assert recipe.command("train") == f"tinyllama train {tmp_path}/copy.yaml --seed 1337"
    for other in (bundled, built, pickle.loads(pickle.dumps(recipe)), recipe.model_copy()):
        assert (other, other.digest, other.to_yaml()) == (recipe, recipe.digest, recipe.to_yaml())


def test_recipe_of_model_card_has_its_numbers() -> None:
    recipe = Recipe.load("tinyllama-1.1b")
    assert num_parameters(recipe.model, 32_000) == 1_100_048_384
    assert recipe.train.batch_tokens == 2_097_152
    assert recipe.train.steps == 1_430_512
    # 24k tokens/s on an A100's 312 TFLOP/s are 52.0 %: no input embedding, causal attention.
    assert 24_000 * flops_per_token(recipe.model, 32_000, 2048) / 312e12 == pytest.approx(0.520, abs=0.001)


def test_recipe_of_llama_3_has_the_numbers_of_llama_3_2_1b() -> None:
    recipe = Recipe.load("llama3-1b")
    assert recipe.tokenizer_kind == "bytelevel"  # `tokenizer train` and `run` would otherwise train one like Llama 2's
    assert recipe.vocab_size == 128_256
    assert num_parameters(recipe.model, 128_256) == 1_235_814_400
    assert recipe.train.batch_tokens == 2_097_152
    assert (recipe.model.head_dim, recipe.model.context_length) == (64, 131_072)


def test_head_dim_is_dim_per_head_unless_given(tmp_path: Path) -> None:
    assert Recipe.load("demo").model.head_dim == 64
    assert Recipe.load("demo", {"model.heads": 8}).model.head_dim == 32
    (tmp_path / "saved.yaml").write_text(Recipe.load("demo").to_yaml())
    assert Recipe.load(tmp_path / "saved.yaml", {"model.heads": 8}).model.head_dim == 32
    given = Recipe.load("demo", {"model.head_dim": 128})
    (tmp_path / "given.yaml").write_text(given.to_yaml())
    assert Recipe.load(tmp_path / "given.yaml", {"model.heads": 8}).model.head_dim == 128
    assert Recipe.load(tmp_path / "given.yaml", {"model.head_dim": None}) == Recipe.load("demo")
    assert given.digest != Recipe.load("demo").digest


SCALING = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_context_length": 64}


def test_flags_set_fields_of_rope_scaling() -> None:
    flags = [word for name, value in SCALING.items() for word in (f"--model.rope_scaling.{name}", str(value))]
    _, overrides = extract_overrides(flags)
    scaling = Recipe.load("demo", overrides).model.rope_scaling
    assert scaling is not None
    assert scaling.model_dump() == SCALING
    assert Recipe.load("demo", {"model.rope_scaling": SCALING}).digest != Recipe.load("demo").digest


@pytest.mark.parametrize(
    ("change", "place", "remedy"),
    [
        ({"type": "yarn"}, "model.rope_scaling.type: 'yarn'", "'llama3' or 'linear'"),
        ({"type": None}, "model.rope_scaling.type: None", "'llama3' or 'linear'"),
        ({"factor": 0.5}, "model.rope_scaling.factor: 0.5", "greater than or equal to 1"),
        ({"factor": float("nan")}, "model.rope_scaling.factor: nan", "finite number"),
        ({"low_freq_factor": None}, "model.rope_scaling", "needs low_freq_factor"),
        ({"low_freq_factor": 4}, "model.rope_scaling", "is not below high_freq_factor 4"),
        ({"original_context_length": None}, "model.rope_scaling", "needs original_context_length"),
        ({"original_context_length": 0}, "model.rope_scaling.original_context_length: 0", "greater than 0"),
        ({"original_context_length": 15}, "context_length 256 is beyond", "240"),
        ({"type": "linear"}, "model.rope_scaling", "has no low_freq_factor"),
        ({"rope_type": "llama3"}, "model.rope_scaling.rope_type", "did you mean type?"),
    ],
)
def test_wrong_scaling_is_refused_in_one_line(change: dict[str, object], place: str, remedy: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.load("demo", {"model.rope_scaling": SCALING | change})
    message = str(error.value)
    assert place in message
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("3T", 3 * 10**12), ("105B", 105 * 10**9), ("20M", 20_000_000), ("2e6", 2_000_000), (7, 7)],
)
def test_token_count_notations(text: object, tokens: int) -> None:
    assert Recipe.load("demo", {"train.tokens": text}).train.tokens == tokens


@pytest.mark.parametrize(
    ("overrides", "place", "remedy"),
    [
        ({"train.tokns": "3"}, "train.tokns", "did you mean tokens?"),
        ({"trian": "3"}, "trian", "did you mean train?"),
        ({"train.tokens": "many"}, "train.tokens: 'many'", "3T, 105B"),
        ({"train.tokens": "0"}, "train.tokens: '0'", "greater than 0"),
        ({"train.batch_sequences": "many"}, "train.batch_sequences: 'many'", "valid integer"),
        ({"model.layers": True}, "model.layers: True", "is true or false"),
        ({"train.optimizer.learning_rate": ".nan"}, "learning_rate: '.nan'", "valid number"),
        ({"train.optimizer.learning_rate": float("inf")}, "learning_rate: inf", "finite number"),
        ({"data.workers": "x"}, "data.workers: 'x'", "valid integer"),
        ({"data.sources.slimpajama.wight": 1}, "data.sources.slimpajama.wight", "did you mean weight?"),
        ({"data.sources.slimpajama.format": "json"}, "data.sources.slimpajama.format", "'jsonl'"),
        ({"data.stages": [{"from_tokens": 0, "weights": {"x": 1}}]}, "'x'", "not in sources"),
        (
            {"data.sources.slimpajama.weight": 0, "data.sources.starcoderdata.weight": 0},
            "sources' weights",
            "sum to zero",
        ),
        ({"data.stages": [{"from_tokens": 0, "weights": {"slimpajama": 0}}]}, "from 0 tokens", "sum to zero"),
        ({"data.sources.slimpajama.weight": -1}, "data.sources.slimpajama.weight: -1", "greater than or equal to 0"),
        ({"data.executor": "slurm"}, "executor slurm", "needs data.slurm"),
        ({"data.sources.slimpajama.path": ""}, "slimpajama.path: ''", "at least 1 character"),
        (
            {"data.sources": {"a": {"format": "text", "path": "x", "weight": 1, "text": "body"}}},
            "data.sources.a",
            "remove text",
        ),
        ({"data.executor": "spark"}, "data.executor: 'spark'", "'local', 'slurm' or 'ray'"),
        ({"model.heads": 7}, "heads 7", "do not divide dim"),
        ({"model.kv_heads": 3}, "kv_heads 3", "do not divide heads"),
        ({"model.head_dim": 9}, "head_dim is 9", "an even number"),
        ({"model.head_dim": 0}, "model.head_dim: 0", "greater than 0"),
        ({"model.rope_scaling.factor": 8}, "model.rope_scaling.type", "missing"),
        ({"train.sequence_length": 4096}, "train.sequence_length 4096", "reduce the sequence length"),
        ({"name": "../elsewhere"}, "name: '../elsewhere'", "match pattern"),
    ],
)
def test_wrong_field_error_has_place_value_and_remedy(overrides: dict[str, object], place: str, remedy: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.load("demo", overrides)
    message = str(error.value)
    assert message.startswith(("demo: ", *(f"--{name}" for name in overrides)))
    assert place in message
    assert remedy in message
    assert "\n" not in message


TWICE = (Path(__file__).parents[2] / "recipes/demo.yaml").read_text().replace("    starcoderdata:", "    slimpajama:")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: x\ntrain: {tokens: 3\n", ":3: not valid YAML"),
        ("# nothing yet\n", ": an empty file"),
        (TWICE, ":10: not valid YAML: 'slimpajama' is a duplicate"),
        (None, ": no such recipe"),
    ],
)
def test_invalid_yaml_error_has_line(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=f"^{path}{problem}"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("1:30:00", "'1:30:00' is read by YAML as 5400; write 5400"),
        ("010", "'010' is read by YAML as 8; write 8"),
        ("0x" + "f" * 5000, "is larger than any field allows"),
        ("1" + ":00" * 3000, "is larger than any field allows"),
        ("9" * 5000, "is not a valid int; put quotes around text"),
        ("'" + "9" * 5000 + "'", "is more than 1e18 tokens"),
    ],
)
def test_ambiguous_or_huge_number_is_one_line(tmp_path: Path, number: str, message: str) -> None:
    recipe = Recipe.load("demo").to_yaml()
    (tmp_path / "odd.yaml").write_text(re.sub(r"(?m)^  tokens: .*$", f"  tokens: {number}", recipe))
    with pytest.raises(InputError, match=r"odd\.yaml") as error:
        Recipe.load(tmp_path / "odd.yaml")
    assert message in str(error.value)
    assert len(str(error.value)) < 400


def test_flag_sets_field_of_null_part(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(Recipe.load("demo").to_yaml())
    recipe = Recipe.load(tmp_path / "recipe.yaml", {"data.executor": "slurm", "data.slurm.partition": "cpu"})
    assert recipe.data.slurm is not None
    assert recipe.data.slurm.partition == "cpu"
    with pytest.raises(InputError, match=r"--name\.x: name is 'demo'"):
        Recipe.load(tmp_path / "recipe.yaml", {"name.x": 1})


def test_fields_of_later_versions_change_the_digest_only_if_they_are_set() -> None:
    """A checkpoint of the first version has this digest, and must still belong to the recipe."""
    recipe = Recipe.load("tinyllama-1.1b")
    assert recipe.digest.startswith("b3b7489f2a4b48d9")
    scaling = {"type": "linear", "factor": 2}
    for field, value in (
        ("train.document_mask", True),
        ("model.head_dim", 128),
        ("model.rope_scaling", scaling),
        ("data.sources.slimpajama.min_tokens", 2048),
    ):
        assert Recipe.load("tinyllama-1.1b", {field: value}).digest != recipe.digest


def test_digest_depends_only_on_fields_affecting_weights() -> None:
    digest = Recipe.load("demo").digest
    neutral = {
        "train.compile": "false",
        "train.micro_batch_sequences": 4,
        "data.store": "elsewhere",
        "name": "other",
        "vocab_size": 300,
    }
    assert Recipe.load("demo", neutral).digest == digest
    for field, value in {
        "seed": 1,
        "train.optimizer.learning_rate": 1e-3,
        "data.sources.slimpajama.weight": 0.6,
    }.items():
        assert Recipe.load("demo", {field: value}).digest != digest


def test_milestones_are_first_steps_that_reach_tokens(small: Path) -> None:
    batch = 6 * 64
    release = {"release.at_tokens": [batch, 5 * batch + 1, 99 * batch], "release.every_tokens": 3 * batch + 2}
    recipe = Recipe.load(small / "recipe.yaml", release | {"train.tokens": 13 * batch})
    assert recipe.milestone_steps() == {1, 4, 6, 7, 10, 13}
    assert Recipe.load(small / "recipe.yaml").milestone_steps() == set()
