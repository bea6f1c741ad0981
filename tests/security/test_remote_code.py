"""No code from a model's folder is run: all calls of transformers forbid it."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tinyllama
from tinyllama import cli
from tinyllama.distributed import World
from tinyllama.errors import InputError
from tinyllama.evaluate.harness import load_language_model
from tinyllama.files import write_json
from tinyllama.release.formats import ReleasedFormat
from tinyllama.release.verify import verify_format

SOURCES = sorted(Path(tinyllama.__file__).parent.rglob("*.py"))
CALLS = ("from_pretrained", "HFLM", "Converter", "pipeline")
"""Functions that load a model or its tokenizer from a folder or the hub."""


def loading(path: Path) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func).split(".")[-1] in CALLS]


def test_model_loading_forbids_remote_code() -> None:
    found = [(path, call) for path in SOURCES for call in loading(path)]
    assert len(found) >= 6
    for path, call in found:
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert options.get("trust_remote_code") == "False", f"{path}:{call.lineno}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A GPT-2's folder without weights."""
    write_json(tmp_path / "model/config.json", {"model_type": "gpt2", "vocab_size": 8})
    return tmp_path / "model"


def name_other_index(model: Path) -> None:
    write_json(model / "own.safetensors.index.json", {"weight_map": {"wte": "../victim.safetensors"}})
    write_json(model / "config.json", {"model_type": "gpt2", "transformers_weights": "own.safetensors.index.json"})


def name_other_weights(model: Path) -> None:
    write_json(model / "config.json", {"model_type": "gpt2", "transformers_weights": "../victim.safetensors"})


def name_base_model(model: Path) -> None:
    write_json(model / "adapter_config.json", {"base_model_name_or_path": "../victim"})


def name_other_tokenizer(model: Path) -> None:
    write_json(model / "tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.0.json", "../tokenizer.1.json"]})


def name_other_vocabulary(model: Path) -> None:
    write_json(model / "tokenizer_config.json", {"special_tokens_map_file": "/home/author/special_tokens_map.json"})
    write_json(model / "special_tokens_map.json", {"vocab": "/etc/passwd"})


def write_sparse_tokenizer(model: Path) -> None:
    with (model / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (name_other_index, "a file outside its folder"),
        (name_other_weights, "weights outside the folder"),
        (name_other_tokenizer, "tokenizer_config.json: names a file outside its folder"),
        (name_other_vocabulary, "special_tokens_map.json: names a file outside its folder"),
        (name_base_model, "belongs to an adapter"),
        (write_sparse_tokenizer, "is larger than 256 MiB"),
    ],
)
def test_transformers_opens_no_folder_that_names_files_outside(
    model: Path, damage: Callable[[Path], None], problem: str
) -> None:
    damage(model)
    with pytest.raises(InputError, match=problem):
        load_language_model(model, 1, torch.float32, World(0, 1, torch.device("cpu")))
    (check,) = verify_format(ReleasedFormat("huggingface", "transformers", "model"), model, {})
    assert not check.passed
    assert problem in check.found


@pytest.mark.slow
def test_model_with_remote_code_is_refused_without_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, target = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tok", None]}
    write_json(model / "config.json", {"model_type": "own", "auto_map": classes, "vocab_size": 8})
    write_json(model / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Tok", None]}})
    (model / "own.py").write_text(f"open({str(target)!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert cli.main(["evaluate", str(model), "--limit", "2"]) == 2
    assert "tinyllama: " in capsys.readouterr().err
    assert not target.exists()
