"""No code from a model's folder is run: all calls of transformers forbid it."""

import ast
from pathlib import Path

import pytest

import tinyllama
from tinyllama import cli
from tinyllama.files import write_json

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
