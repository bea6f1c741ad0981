"""Problems of a recipe and its tokenizer are found before `prepare` and `train` write, and by `doctor`."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import yaml
from tests.conftest import contents, python_sources, small_recipe
from tests.vocabularies import train_byte_level, train_sentencepiece
from tokenizers import pre_tokenizers

from tinyllama import preflight
from tinyllama.errors import InputError
from tinyllama.files import write_json
from tinyllama.model.weights import config_to_hugging_face
from tinyllama.recipe import Recipe
from tinyllama.release import formats
from tinyllama.stages import run_stages
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import SentencePieceBackend
from tinyllama.tracking import trackers

pytestmark = pytest.mark.slow

GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
THREE_DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
"""Pre-tokenizer that llama.cpp does not support."""
MILESTONE = {"release.at_tokens": [3 * 6 * 64], "release.formats": ["huggingface", "gguf"], "release.tasks": []}
EVALUATED: dict[str, Any] = {"train.evaluate_every_steps": 20}
FLOAT8 = {"train.float8": True, "train.compile": True}


def sentencepiece_defaults(folder: Path) -> str:
    """Write a tokenizer.model with the trainer's default options: NFKC, no byte fallback."""
    model = io.BytesIO()
    lines = [line for text in python_sources(20) for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=600, minloglevel=2
    )
    (folder / "own.model").write_bytes(model.getvalue())
    return str(folder / "own.model")


def byte_level(folder: Path, words: Any, settings: dict[str, str] | None = None) -> str:
    """Write a byte-level tokenizer.json with the pre-tokenizer `words`; return its folder."""
    (folder / "bytes").mkdir()
    train_byte_level(words, "<|start|>", "<|stop|>").save(str(folder / "bytes/tokenizer.json"))
    named = {"bos_token": "<|start|>", "eos_token": "<|stop|>"} if settings is None else settings
    (folder / "bytes/tokenizer_config.json").write_text(json.dumps(named))
    return str(folder / "bytes")


def write_recipe(folder: Path, small: Path, **fields: Any) -> Path:
    """Write a recipe for the small data set's text with the store `folder/store`, which does not exist."""
    own = Recipe.model_validate(small_recipe(small)).model_dump(mode="json")
    own["data"]["store"] = str(folder / "store")
    (folder / "plain.yaml").write_text(yaml.safe_dump(own))
    (folder / "recipe.yaml").write_text(Recipe.load(folder / "plain.yaml", fields).to_yaml())
    return folder / "recipe.yaml"


def tinyllama(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinyllama", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )


def refused_everywhere(recipe: Path, small: Path, row: str, place: str, keyword: str) -> None:
    """Assert that `prepare` and `train` refuse a recipe in one line before they write, and that `doctor` lists it.

    `train` gets an existing store, so that it does not refuse a missing one.
    """
    folder = recipe.parent
    before = contents(folder)
    for command in (["prepare", recipe], ["train", recipe, "--data.store", small / "store"]):
        done = tinyllama(*command, folder=folder)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"tinyllama: {place}: ")
        assert keyword in line
    looked = tinyllama("doctor", recipe, "--json", folder=folder)
    assert looked.returncode == 1, looked.stderr
    found = json.loads(looked.stdout)
    assert row in found["missing"]
    (listed,) = (entry for entry in found["checks"] if entry["what"] == row)
    assert place in listed["found"]
    assert keyword in listed["found"]
    assert contents(folder) == before


def test_unconvertible_tokenizer_is_refused_before_prepare(small: Path, tmp_path: Path) -> None:
    model = sentencepiece_defaults(tmp_path)
    recipe = write_recipe(tmp_path, small, tokenizer=model)
    refused_everywhere(recipe, small, "tokenizer.json", model, "byte_fallback=true")


def test_unsupported_gguf_pretokenizer_is_refused_before_prepare(small: Path, tmp_path: Path) -> None:
    folder = byte_level(tmp_path, THREE_DIGITS)
    recipe = write_recipe(tmp_path, small, tokenizer=folder, **MILESTONE)
    refused_everywhere(recipe, small, "release.formats: gguf", f"{folder}/tokenizer.json", "remove gguf")


def test_unsupported_format_without_milestone_is_a_warning(small: Path, tmp_path: Path) -> None:
    folder = byte_level(tmp_path, THREE_DIGITS)
    recipe = write_recipe(tmp_path, small, tokenizer=folder, **MILESTONE | {"release.at_tokens": []})
    prepared = tinyllama("prepare", recipe, folder=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    assert f"{folder}/tokenizer.json: " in prepared.stderr and "remove gguf" in prepared.stderr
    looked = tinyllama("doctor", recipe, "--json", folder=tmp_path)
    rows = {row["what"]: row for row in json.loads(looked.stdout)["checks"]}
    assert rows["release.formats: gguf"]["status"] == "warning"
    trained = tinyllama("train", recipe, "--train.tokens", 2 * 6 * 64, folder=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "remove gguf" in trained.stderr


def test_prepare_imports_no_package_that_it_does_not_need(small: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, small, **MILESTONE | {"release.tasks": ["arc_easy", "swag"]})
    command = [sys.executable, "-X", "importtime", "-m", "tinyllama", "prepare", str(recipe)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tinyllama.prepare.cleaning" in imported
    assert not imported & {"torch", "spacy"}


def found(recipe: Path, tokenizer: str) -> dict[str, str]:
    return {
        finding.what: str(finding.problem)
        for finding in preflight.findings(Recipe.load(recipe), Tokenizer.load(tokenizer))
    }


def test_supported_tokenizer_has_no_findings(small: Path, tmp_path: Path) -> None:
    formats = {"release.formats": ["huggingface", "gguf", "ctranslate2"], "release.tasks": ["swag", "hellaswag"]}
    recipe = write_recipe(tmp_path, small, **MILESTONE | formats)
    assert found(recipe, str(small / "tokenizer")) == {}
    assert found(recipe, byte_level(tmp_path, GPT2_WORDS)) == {}


def test_missing_special_token_is_found(small: Path, tmp_path: Path) -> None:
    folder = byte_level(tmp_path, GPT2_WORDS, {"bos_token": "<|start|>"})
    recipe = write_recipe(tmp_path, small, tokenizer=folder)
    assert "set data.document.eos to false" in found(recipe, folder)["data.document"]
    assert found(write_recipe(tmp_path, small, **{"data.document.eos": False}), folder) == {}


@pytest.mark.parametrize(
    ("fields", "what", "remedy", "stops"),
    [
        ({"release.tasks": ["winogrand"]}, "release.tasks", "did you mean winogrande", True),
        (EVALUATED | {"train.evaluate_tasks": "winogrand"}, "train.evaluate_tasks", "did you mean winogrande", True),
        ({"release.tasks": ["piqa"], "release.limit": 1}, "release.tasks", "raise the limit to at least 2", True),
        ({"release.baselines": ["ada/pythia", "pythia"]}, "release.baselines", "pythia is neither a folder", False),
        (FLOAT8 | {"model.ffn_dim": 136}, "train.float8", "remove train.float8", True),
        (FLOAT8 | {"model.dim": 72, "model.heads": 6}, "train.float8", "multiples of 16", True),
        (FLOAT8 | {"model.head_dim": 22}, "train.float8", "heads x head_dim is 88", True),
    ],
)
def test_problem_of_milestone_or_training_is_found(
    small: Path, tmp_path: Path, fields: dict[str, Any], what: str, remedy: str, stops: bool
) -> None:
    recipe = Recipe.load(write_recipe(tmp_path, small, **MILESTONE | fields))
    (finding,) = preflight.findings(recipe, Tokenizer.load(small / "tokenizer"))
    assert (finding.what, finding.stops) == (what, stops)
    assert remedy in str(finding.problem)


def test_initial_weights_are_checked_until_run_starts(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "weights"
    recipe = write_recipe(tmp_path, small, **{"train.initial_weights": str(folder)})
    write_json(folder / "config.json", config_to_hugging_face(Recipe.load(recipe).model, 320, 1, 2))
    problems = found(recipe, str(small / "tokenizer"))
    assert list(problems) == ["initial weights"]
    assert "320" in problems["initial weights"]
    begun = {"source": str(folder), "digest": "", "vocab_size": 600}
    write_json(tmp_path / "runs/small/initial_weights.json", begun)
    assert found(recipe, str(small / "tokenizer")) == {}


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"normalization_rule_name": "nfkc"}, "normalization_rule_name=identity"),
        ({"byte_fallback": False}, "byte_fallback=true"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=false"),
        ({"add_dummy_prefix": False}, "add_dummy_prefix=true"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=false"),
        ({"user_defined_symbols": ["return", "  "]}, "no user_defined_symbols"),
    ],
)
def test_unconvertible_sentencepiece_option_is_reported(options: dict[str, Any], remedy: str) -> None:
    file = SentencePieceBackend("mine.model", train_sentencepiece(**options))
    with pytest.raises(InputError, match=rf"mine\.model: .* SentencePiece's .*{remedy},") as refused:
        file.to_tokenizer_json()
    assert "\n" not in str(refused.value)


def gap(document: dict[str, Any]) -> None:
    """Give the last token an id after a gap."""
    vocabulary = document["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] += 5


@pytest.mark.parametrize(
    ("name", "change", "settings", "keyword"),
    [
        ("ctranslate2", gap, {"bos_token": "<|start|>", "eos_token": "<|stop|>"}, "no token has id 599"),
        ("ctranslate2", lambda _: None, {"eos_token": "<|stop|>"}, "no bos_token"),
        ("ctranslate2", lambda _: None, {"bos_token": "<|start|>"}, "no eos_token"),
        ("gguf", lambda _: None, {"bos_token": "<|start|>"}, "no eos_token"),
    ],
)
def test_tokenizer_that_engine_reads_differently_is_refused(
    tmp_path: Path, name: str, change: Any, settings: dict[str, str], keyword: str
) -> None:
    path = Path(byte_level(tmp_path, GPT2_WORDS, settings)) / "tokenizer.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    tokenizer = Tokenizer.load(path.parent)
    tokenizer.check_formats(["huggingface"])
    with pytest.raises(InputError, match=rf"tokenizer\.json: .*{keyword}.*; remove {name}"):
        tokenizer.check_formats(["huggingface", name])


@pytest.mark.parametrize(
    ("overrides", "environment", "message"),
    [
        ({"data.executor": "slurm", "data.slurm": {"partition": "cpu"}}, {}, "data.executor: slurm .*prepare"),
        ({}, {"WORLD_SIZE": "2"}, "run: uses one process.*`train`"),
        ({"release.limit": 1}, {}, "release.limit"),
        ({"track.wandb": "mine"}, {}, "track.wandb"),
        ({"release.formats": ["gguf"]}, {}, "formats: llama_cpp"),
        (EVALUATED | {"train.evaluate_tasks": "lambada_openai"}, {}, "train.evaluate_tasks: .*items"),
    ],
    ids=["slurm", "torchrun", "limit", "tracker", "format", "items"],
)
def test_impossible_stages_are_refused_before_the_first_one(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: dict[str, Any],
    environment: dict[str, str],
    message: str,
) -> None:
    for module, library in ((trackers, "wandb"), (formats, "llama_cpp")):
        monkeypatch.setattr(module, "find_spec", lambda name, missing=library: None if name == missing else object())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    recipe = Recipe.load(small / "recipe.yaml", {"data.store": str(tmp_path / "store"), **overrides})
    with pytest.raises(InputError, match=message):
        run_stages(recipe, [("a stage", lambda recipe: pytest.fail("started"))])
