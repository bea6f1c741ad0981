"""The output of `tinyllama plan`, and its checks of flags."""

import json
import re
from pathlib import Path

import pytest
import yaml
from tests.cli.json_keys import read_documented_json
from tests.conftest import small_recipe

from tinyllama.cli import main, training
from tinyllama.errors import InputError
from tinyllama.hardware import HARDWARE_SPECS
from tinyllama.plan.estimate import Assumptions
from tinyllama.plan.show import resolve_hardware
from tinyllama.recipe import Recipe


def test_json_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tinyllama-1.1b", "--hardware", "h100", "--gpus", "8", "--json"]) == 0
    read_documented_json("plan", capsys.readouterr().out, exact=False)


def test_plan_without_the_tokenizer_assumes_the_vocabulary_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "llama3-1b", "--hardware", "h100", "--gpus", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["memory_fits"]) == (1_235_814_400, True)


@pytest.mark.parametrize(("name", "multiplied"), [("tinyllama-1.1b", 1_034_512_384), ("llama3-1b", 1_235_814_400)])
def test_printed_formula_gives_the_flops(name: str, multiplied: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name, "--hardware", "h100", "--gpus", "8"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FLOPs per token")]
    shape, length = Recipe.load(name).model, Recipe.load(name).train.sequence_length
    attention = shape.layers * shape.heads * shape.head_dim * length
    assert f"{6 * (multiplied + attention):,} = 6 x " in line
    assert ("input embedding" in line) == (not shape.tie_embeddings)


def test_sweep_is_printed_and_plotted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "sweep.png"
    command = ["plan", "tinyllama-1.1b", "--hardware", "h100", "--sweep", "gpus=8,64,4096", "--plot", str(plot)]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "4,096 GPUs: train.batch_sequences: " in output
    assert "such as --train.batch_sequences 4096" in output
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("flags", "place", "keyword"),
    [
        (["--hardware", "h1000"], "--hardware h1000", "a100-40g"),
        (["--gpus", "0"], "--gpus 0", "number of GPUs"),
        (["--failure-hours", "inf"], "--failure-hours inf", "GPU-hours"),
        (["--disk", "1e-300"], "--disk 1e-300", "bytes per second"),
        (["--price", "nan"], "--price nan", "amount"),
        (["--vocab-size", "-5"], "--vocab-size -5", "vocabulary"),
        (["--mfu", "56"], "--mfu 56.0", "fraction"),
        (["--sweep", "gpus=²"], "--sweep gpus=²", "GPU counts"),
        (["--sweep", "nodes=2"], "--sweep nodes=2", "GPU counts"),
        (["--sweep", "gpus=8", "--hardware", "h100", "--plot", "/"], "--plot /", "file"),
        (["--gpus", "3", "--hardware", "h100"], "train.batch_sequences", "3 ranks"),
        (["--hardware", "t4"], "train.precision: t4", "--train.precision fp16"),
        (["--hardware", "v100-16g", "--train.precision", "fp16", "--train.optimizer.name", "muon"],
         "train.optimizer.name", "adamw"),
        (["--hardware", "cpu", "--train.precision", "fp16", "--measure"], "train.precision", "--hardware"),
        (["--gpus", "16", "--parallel.replicate", "3", "--hardware", "h100"], "parallel: ", "16 ranks"),
    ],
)  # fmt: skip
def test_invalid_flag_is_one_line(
    flags: list[str], place: str, keyword: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "tinyllama-1.1b", *flags]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert place in line and keyword in line


def test_fp16_is_planned_for_a_gpu_without_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--hardware", "t4", "--train.precision", "fp16", "--mfu", "0.5", "--json"]
    assert main(["plan", "tinyllama-1.1b", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_second_per_gpu"] == pytest.approx(0.5 * 65e12 / found["flops_per_token"])


def test_measured_speed_replaces_the_mfu(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "{dim: 64, layers: 4, heads: 2, kv_heads: 1, ffn_dim: 128, context_length: 64}"
    fields = ["--model", shape, "--train.sequence_length", "64", "--train.compile", "false"]
    assert main(["plan", "demo", *fields, "--hardware", "cpu", "--measure", "--vocab-size", "512", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    micro_batch, update = found["assumptions"]["measured_seconds"]
    assert found["step_seconds"] == pytest.approx(micro_batch + update)
    assert found["tokens_per_second_per_gpu"] == pytest.approx(8 * 64 / found["step_seconds"])
    assert 0 < found["mfu"] < 1


def test_vocabulary_size_of_the_recipe_is_used_without_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(tmp_path) | {"vocab_size": 512}))
    sizes = []
    for flags in ([], ["--vocab-size", "768"], ["--vocab_size=1024"]):
        assert main(["plan", str(recipe), "--hardware", "h100", "--json", *flags]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["vocab_size"])
    assert sizes == [512, 768, 1024]


def test_help_names_all_hardware() -> None:
    assert set(HARDWARE_SPECS) <= set(re.findall(r"[\w-]+", str(training.plan.__doc__)))


@pytest.mark.parametrize("measured", [False, True])
def test_unknown_gpu_needs_a_named_one(monkeypatch: pytest.MonkeyPatch, measured: bool) -> None:
    monkeypatch.setattr("tinyllama.plan.measure.detect_hardware", lambda: None)
    with pytest.raises(InputError, match="not in the table") as error:
        resolve_hardware(Recipe.load("demo"), "h100" if measured else None, Assumptions(), measured, 512)
    assert ("--measure" in str(error.value)) == measured
