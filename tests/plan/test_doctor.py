"""`tinyllama doctor`: pure checks of machines that are not available here, and probes of this machine."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.cli.json_keys import read_documented_json
from tests.conftest import python_sources, small_recipe

from tinyllama import cli, hardware
from tinyllama.plan.doctor import CheckResult, check_float8_support, check_machine, check_recipe, check_sizes, verdict
from tinyllama.plan.system_info import Device, SystemInfo, probe, unmet_requirements
from tinyllama.recipe import Recipe

H100 = Device("NVIDIA H100 80GB HBM3", 80_000_000_000, (9, 0))
A16GB = replace(H100, memory_bytes=16_000_000_000)
V100 = Device("Tesla V100-SXM2-32GB", 34_000_000_000, (7, 0))
CPU = SystemInfo(
    python="3.12.1", system="Linux", version="0.1.0", torch="2.13.0", cuda=None, cores=8, memory_bytes=32_000_000_000,
    shared_memory_bytes=1 << 34, open_files=65_536, can_compile=True, has_nvidia_gpu=False,
    attention=("flash", "plain"), backends=("gloo",), unmet={"": (), "float8": (), "ray": ()},
    offline_tasks=("hellaswag",),
)  # fmt: skip
EIGHT_GPUS = replace(CPU, cuda="13.0", has_nvidia_gpu=True, devices=(H100,) * 8, backends=("gloo", "nccl"))
PETABYTE = 10**15


def by_name(results: Sequence[CheckResult]) -> dict[str, CheckResult]:
    return {result.what: result for result in results}


def missing(results: Sequence[CheckResult]) -> list[str]:
    return [result.what for result in results if result.status == "missing"]


@pytest.mark.parametrize("found", [CPU, EIGHT_GPUS, replace(CPU, open_files=-1)])
def test_complete_machine_has_no_warning(found: SystemInfo) -> None:
    assert not [result for result in check_machine(found) if result.status != "ok"]


@pytest.mark.parametrize(
    ("change", "what", "status", "remedy"),
    [
        ({"can_compile": False}, "torch.compile", "warning", "python3-dev"),
        ({"open_files": 256}, "open files", "warning", "ulimit"),
        ({"has_nvidia_gpu": True}, "GPU", "warning", "CUDA build"),
        ({"has_nvidia_gpu": True, "cuda": "13.0"}, "GPU", "warning", "driver for CUDA 13.0"),
        ({"devices": (V100,)}, "GPU 0", "warning", "--train.precision fp16"),
        ({"devices": (replace(V100, capability=(6, 0)),)}, "GPU 0", "warning", "--train.precision fp32"),
        ({"devices": (H100, H100)}, "several GPUs", "missing", "CUDA build"),
        ({"devices": (H100, H100), "shared_memory_bytes": 1 << 26}, "/dev/shm", "warning", "--shm-size"),
        ({"unmet": {"": ("numpy is 1.26, not >=2.0",)}}, "tinyllama", "missing", "pip install"),
        ({"unmet": {"": (), "ray": ("ray is missing",)}}, "ray", "warning", 'pip install "tinyllama[ray]"'),
    ],
)
def test_problem_of_machine_has_status_and_remedy(change: dict[str, Any], what: str, status: str, remedy: str) -> None:
    result = by_name(check_machine(replace(CPU, **change)))[what]
    assert result.status == status
    assert remedy in result.found


@pytest.mark.parametrize(
    ("found", "free", "overrides", "what", "status", "keyword"),
    [
        (EIGHT_GPUS, PETABYTE, {}, "batch", "ok", "128 sequences"),
        (EIGHT_GPUS, PETABYTE, {}, "memory", "ok", "one GPU"),
        (EIGHT_GPUS, PETABYTE, {}, "disk", "ok", "for token store"),
        (EIGHT_GPUS, PETABYTE, {}, "disk", "ok", "for checkpoints and releases"),
        (EIGHT_GPUS, 10**12, {}, "disk", "missing", "free"),
        (replace(EIGHT_GPUS, devices=(H100,) * 7), PETABYTE, {}, "batch", "missing", "multiple of 7"),
        (EIGHT_GPUS, PETABYTE, {"train.micro_batch_sequences": 128}, "memory", "missing", "micro_batch_sequences 16"),
        (replace(EIGHT_GPUS, devices=(A16GB,)), PETABYTE, {}, "memory", "missing", "more or larger GPUs"),
    ],
)
def test_batch_memory_and_disk_are_those_of_the_plan(
    found: SystemInfo, free: int, overrides: dict[str, Any], what: str, status: str, keyword: str
) -> None:
    recipe = Recipe.load("tinyllama-1.1b", overrides)
    result = by_name(check_sizes(recipe, 32_000, found, lambda path: (1, free)))[what]
    assert result.status == status
    assert keyword in result.found


def test_recipe_of_llama_3_lacks_only_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tinyllama.plan.doctor.disk_and_free_bytes", lambda path: (1, PETABYTE))
    results = check_recipe(Recipe.load("llama3-1b"), EIGHT_GPUS)
    assert missing(results) == ["tokenizer", "raw files of slimpajama", "raw files of starcoderdata"]
    assert [result.what for result in results if result.status == "warning"] == ["token store", "items of the tasks"]


def test_each_disk_has_a_result() -> None:
    recipe = Recipe.load("tinyllama-1.1b")
    results = check_sizes(recipe, 32_000, EIGHT_GPUS, lambda path: (path.parts[0] == "data", 10**12))
    assert [result.status for result in results if result.what == "disk"] == ["ok", "missing"]


@pytest.mark.parametrize(
    ("found", "status", "remedy"),
    [
        (EIGHT_GPUS, "ok", ""),
        (CPU, "missing", "Ada, Hopper"),
        (replace(EIGHT_GPUS, unmet={"float8": ("torchao is missing",)}), "missing", 'pip install "tinyllama[float8]"'),
    ],
)
def test_float8_needs_torchao_and_recent_gpus(found: SystemInfo, status: str, remedy: str) -> None:
    result = check_float8_support(found)
    assert result.status == status
    assert remedy in result.found


@pytest.mark.parametrize(
    ("devices", "fields", "expected"),
    [
        ((V100,), {"precision": "bf16"}, ("bf16", "missing", "train.precision: Tesla V100")),
        ((V100,), {"precision": "fp16", "optimizer.name": "muon"}, ("bf16", "missing", "train.optimizer.name: muon")),
        ((V100,), {"precision": "fp16"}, None),
        ((H100,), {"precision": "bf16"}, None),
        ((), {"precision": "fp16"}, ("train.precision", "warning", "very slow")),
        ((), {"precision": "bf16"}, None),
    ],
)
def test_precision_is_checked_against_the_devices(
    small: Path, devices: tuple[Device, ...], fields: dict[str, Any], expected: tuple[str, str, str] | None
) -> None:
    recipe = Recipe.load(small / "recipe.yaml", {f"train.{name}": value for name, value in fields.items()})
    results = by_name(check_recipe(recipe, replace(CPU, devices=devices)))
    if expected is None:
        assert not {"bf16", "train.precision"} & results.keys()
    else:
        what, status, found = expected
        assert results[what].status == status
        assert found in results[what].found


def test_verdict_names_what_is_missing() -> None:
    results = [CheckResult("recipe", "tokenizer", "none", "missing"), CheckResult("recipe", "disk", "full", "warning")]
    assert verdict("mine", results) == "\nmine: missing: tokenizer"
    assert verdict("mine", results[1:]) == "\nmine: nothing is missing; warnings: 1"


def test_unmet_requirements_are_listed_per_extra() -> None:
    unmet = unmet_requirements("lm_eval")
    assert unmet[""] == ()
    assert any("is missing" in problem for problems in unmet.values() for problem in problems)


def test_prepared_recipe_lacks_nothing(small: Path) -> None:
    results = by_name(check_recipe(Recipe.load(small / "recipe.yaml"), probe()))
    assert not missing([*results.values()])
    assert "600" in results["tokenizer"].found
    found, first = results["raw files of modules"].found, python_sources(1)[0]
    assert found.startswith("2 files")
    assert f"row 0 of {small}/raw/modules/a.jsonl has {len(first.encode()):,} bytes of text: {first[:40]!r}" in found


def test_recipe_needs_raw_files_only_without_store(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(small / "raw/modules", tmp_path / "raw/modules")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(tmp_path)))
    results = check_recipe(Recipe.load(tmp_path / "recipe.yaml"), CPU)
    assert missing(results) == ["raw files of lines"]
    assert by_name(results)["token store"].found.endswith(f"; run: tinyllama prepare {tmp_path}/recipe.yaml")
    shutil.copytree(small / "store", tmp_path / "store")
    results = check_recipe(Recipe.load(tmp_path / "recipe.yaml"), CPU)
    assert not missing(results)
    assert by_name(results)["raw files of lines"].status == "warning"


EVALUATED = {"train.evaluate_every_steps": 20}


@pytest.mark.parametrize(
    ("overrides", "what", "status", "remedy"),
    [
        ({"release.tasks": ["helaswag"]}, "release.tasks", "missing", "did you mean hellaswag"),
        ({"data.executor": "slurm", "data.slurm.partition": "cpu"}, "data.executor", "missing", "login node"),
        ({"tokenizer": "nowhere/at/all"}, "tokenizer", "missing", "recipe.yaml --tokenizer nowhere/at/all"),
        ({"tokenizer": "nowhere/here"}, "tokenizer", "missing", "recipe.yaml --tokenizer nowhere/here (for a"),
        ({"data.sources.lines.text": "body"}, "raw files of lines", "warning", "rows have the fields text"),
        ({"train.float8": True, "train.compile": True}, "train.float8", "missing", "remove"),
        ({"data.sources.lines.clean": {"filters": ["c4"], "language": "xx"}}, "data.sources.*.clean", "missing",
         "ISO 639-1"),
        (EVALUATED | {"train.evaluate_tasks": "helaswag"}, "train.evaluate_tasks", "missing", "did you mean hellaswag"),
        (EVALUATED | {"train.evaluate_tasks": "lambada_openai"}, "items of the tasks", "warning",
         "not on this machine: lambada"),
        ({"release.tasks": ["hellaswag", "lambada_openai"]}, "items of the tasks", "warning",
         "lambada_openai; a connection"),
    ],
)  # fmt: skip
def test_recipe_field_is_checked_against_its_needs(
    small: Path, overrides: dict[str, Any], what: str, status: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no sbatch
    result = by_name(check_recipe(Recipe.load(small / "recipe.yaml", overrides), CPU))[what]
    assert result.status == status
    assert remedy in result.found


def test_gpu_that_training_refuses_is_missing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load(small / "recipe.yaml")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "nvidia_devices", lambda: [Path("/dev/nvidia0")])
    results = check_recipe(recipe, CPU)
    assert missing(results) == ["GPU"]
    assert by_name(results)["GPU"].found.startswith("CUDA: ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not missing(check_recipe(recipe, CPU))


def test_exit_status_is_1_only_if_something_is_missing(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(small / "recipe.yaml"), "--json"]) == 0
    output = read_documented_json("doctor", capsys.readouterr().out, exact=False)
    assert output["missing"] == []
    assert output["recipe"] == "small"
    assert {check["section"] for check in output["checks"]} == {"software", "devices", "system", "extras", "recipe"}
    recipe = str(small / "recipe.yaml")
    for store, following in ((small / "store", "train"), (Path("nowhere"), "prepare")):
        assert cli.main(["doctor", recipe, "--data.store", str(store)]) == 0
        assert capsys.readouterr().err.splitlines()[-1] == f"next: tinyllama {following} {recipe} --data.store {store}"
    assert cli.main(["doctor", recipe, "--tokenizer", "nowhere/at/all"]) == 1
    printed = capsys.readouterr()
    assert printed.out.rstrip().endswith("small: missing: tokenizer")
    assert "next: " not in printed.err
