"""`tinyllama doctor`: machines that nobody has at hand, judged by pure functions; and this one, for real."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import small_recipe

from tinyllama import cli
from tinyllama.plan.checks import CheckResult, Status, machine_rows
from tinyllama.plan.doctor import verdict
from tinyllama.plan.recipe_checks import float8_row, recipe_rows, size_rows
from tinyllama.plan.system_info import Device, SystemInfo, probe, unmet_requirements
from tinyllama.recipe import Recipe

H100 = Device("NVIDIA H100 80GB HBM3", 80_000_000_000, (9, 0), bf16=True)
V100 = Device("Tesla V100-SXM2-32GB", 34_000_000_000, (7, 0), bf16=False)
CPU = SystemInfo(
    python="3.12.1", system="Linux", version="0.1.0", torch="2.13.0", cuda=None, cores=8, memory_bytes=32_000_000_000,
    shared_memory_bytes=1 << 34, open_files=65_536, can_compile=True, has_nvidia_driver=False,
    attention=("flash", "plain"), back_ends=("gloo",), required={"": (), "float8": (), "ray": ()},
    offline_tasks=("hellaswag",),
)  # fmt: skip
EIGHT = replace(CPU, cuda="13.0", has_nvidia_driver=True, devices=(H100,) * 8, back_ends=("gloo", "nccl"))
ROOM = 10**15


def by_name(rows: list[CheckResult]) -> dict[str, CheckResult]:
    return {row.what: row for row in rows}


def marks(rows: list[CheckResult], mark: Status) -> list[str]:
    return [row.what for row in rows if row.mark == mark]


def sized(
    name: str, found: SystemInfo, free: int = ROOM, overrides: dict[str, Any] | None = None
) -> dict[str, CheckResult]:
    return by_name(size_rows(Recipe.load(name, overrides), 32_000, found, lambda path: (1, free)))


def test_a_machine_that_has_everything_has_no_warning() -> None:
    assert not [row for row in (*machine_rows(CPU), *machine_rows(EIGHT)) if row.mark != "ok" or row.remedy]


@pytest.mark.parametrize(
    ("change", "what", "mark", "remedy"),
    [
        ({"can_compile": False}, "torch.compile", "warning", "python3-dev"),
        ({"open_files": 256}, "open files", "warning", "ulimit"),
        ({"has_nvidia_driver": True}, "GPU", "warning", "CUDA build"),
        ({"has_nvidia_driver": True, "cuda": "13.0"}, "GPU", "warning", "driver for CUDA 13.0"),
        ({"devices": (V100,)}, "GPU 0", "warning", "fp32"),
        ({"devices": (H100, H100)}, "GPUs together", "missing", "CUDA build"),
        ({"devices": (H100, H100), "shared_memory_bytes": 1 << 26}, "/dev/shm", "warning", "--shm-size"),
        ({"required": {"": ("numpy is 1.26, not >=2.0",)}}, "tinyllama", "missing", "pip install"),
        ({"required": {"": (), "ray": ("ray is missing",)}}, "ray", "warning", 'pip install "tinyllama[ray]"'),
    ],
)
def test_what_a_machine_lacks_is_marked_with_its_remedy(
    change: dict[str, Any], what: str, mark: str, remedy: str
) -> None:
    row = by_name(machine_rows(replace(CPU, **change)))[what]
    assert row.mark == mark
    assert remedy in row.remedy


def test_any_number_of_open_files_is_no_lack() -> None:
    assert by_name(machine_rows(replace(CPU, open_files=-1)))["open files"].mark == "ok"


def test_a_model_that_fits_the_gpus_and_the_disk_misses_nothing() -> None:
    rows = sized("tinyllama-1.1b", EIGHT)
    assert not marks(list(rows.values()), "missing")
    assert "128 sequences each" in rows["batch"].found


def test_a_batch_that_does_not_divide_among_the_gpus_is_missing_its_divisor() -> None:
    row = sized("tinyllama-1.1b", replace(EIGHT, devices=(H100,) * 7))["batch"]
    assert row.mark == "missing"
    assert "1024 rows do not divide among 7 ranks" in row.found
    assert row.remedy.startswith("choose a multiple of 7")


def test_a_micro_batch_too_large_for_the_gpus_is_told_the_largest_that_fits() -> None:
    row = sized("tinyllama-1.1b", EIGHT, overrides={"train.micro_batch_sequences": 128})["memory"]
    assert row.mark == "missing"
    flag, largest = row.remedy.split()
    assert flag == "--train.micro_batch_sequences"
    assert sized("tinyllama-1.1b", EIGHT, overrides={"train.micro_batch_sequences": largest})["memory"].mark == "ok"


def test_a_model_too_large_for_one_gpu_is_told_to_take_more() -> None:
    small = replace(EIGHT, devices=(replace(H100, memory_bytes=16_000_000_000),))
    assert "more or larger GPUs" in sized("tinyllama-1.1b", small)["memory"].remedy


def test_a_disk_holds_store_checkpoints_and_releases_together() -> None:
    row = sized("tinyllama-1.1b", EIGHT)["disk"]
    assert "checkpoints and releases" in row.found
    assert "token store" in row.found
    assert sized("tinyllama-1.1b", EIGHT, free=10**12)["disk"].mark == "missing"


def test_two_disks_have_a_row_each(tmp_path: Path) -> None:
    recipe = Recipe.load("tinyllama-1.1b")
    rows = size_rows(recipe, 32_000, EIGHT, lambda path: (path.parts[0] == "data", 10**12))
    assert [row.mark for row in rows if row.what == "disk"] == ["ok", "missing"]


@pytest.mark.parametrize(
    ("found", "mark", "remedy"),
    [
        (EIGHT, "ok", ""),
        (CPU, "missing", "GPUs from Ada and Hopper on"),
        (replace(EIGHT, required={"float8": ("torchao is missing",)}), "missing", 'pip install "tinyllama[float8]"'),
    ],
)
def test_float8_needs_torchao_and_gpus_that_have_it(found: SystemInfo, mark: str, remedy: str) -> None:
    row = float8_row(found)
    assert row.mark == mark
    assert remedy in row.remedy


def test_the_verdict_names_what_is_missing() -> None:
    rows = [CheckResult("recipe", "tokenizer", "none", "missing"), CheckResult("recipe", "disk", "full", "warning")]
    assert verdict("mine", rows) == "\nmine: missing: tokenizer"
    assert verdict("mine", rows[1:]) == "\nmine: nothing is missing; warnings: 1"


def test_requirements_of_installed_packages_are_read_by_extra() -> None:
    assert unmet_requirements("lm_eval")[""] == ()
    assert any("is missing" in word for words in unmet_requirements("lm_eval").values() for word in words)


def test_a_prepared_recipe_misses_nothing_here(small: Path) -> None:
    rows = by_name(recipe_rows(Recipe.load(small / "recipe.yaml"), probe()))
    assert not [row for row in rows.values() if row.mark == "missing"]
    assert rows["tokenizer"].found.endswith("600 pieces")
    assert rows["raw files of modules"].found.startswith("2 files")


def test_without_its_store_a_recipe_needs_its_raw_files(small: Path, tmp_path: Path) -> None:
    fields = small_recipe(tmp_path)
    shutil.copytree(small / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(small / "raw/modules", tmp_path / "raw/modules")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    rows = by_name(recipe_rows(Recipe.load(tmp_path / "recipe.yaml"), probe()))
    assert marks(list(rows.values()), "missing") == ["raw files of lines"]
    assert rows["token store"].remedy == "tinyllama prepare small"
    shutil.copytree(small / "store", tmp_path / "store")
    rows = by_name(recipe_rows(Recipe.load(tmp_path / "recipe.yaml"), probe()))
    assert not marks(list(rows.values()), "missing")
    assert rows["raw files of lines"].mark == "warning"


@pytest.mark.parametrize(
    ("overrides", "what", "remedy"),
    [
        ({"release.tasks": ["helaswag"]}, "release.tasks", "did you mean hellaswag"),
        ({"data.executor": "slurm", "data.slurm.partition": "cpu"}, "data.executor", "login node"),
        ({"tokenizer": "nowhere/at/all"}, "tokenizer", "tinyllama tokenizer train small"),
        ({"train.float8": True}, "train.float8", "take it out"),
        ({"data.sources.lines.clean": {"filters": ["c4"], "language": "xx"}}, "data.sources.*.clean", "ISO 639-1"),
    ],
)
def test_each_field_of_a_recipe_is_held_against_what_it_needs(
    small: Path, overrides: dict[str, Any], what: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no sbatch
    row = by_name(recipe_rows(Recipe.load(small / "recipe.yaml", overrides), CPU))[what]
    assert row.mark == "missing"
    assert remedy in row.remedy


def test_tasks_whose_items_are_on_the_hub_are_named(small: Path) -> None:
    overrides = {"release.tasks": ["hellaswag", "lambada_openai"]}
    row = by_name(recipe_rows(Recipe.load(small / "recipe.yaml", overrides), CPU))["items of the tasks"]
    assert row.mark == "warning"
    assert row.found == "from the hub: lambada_openai"


def test_the_command_exits_with_1_only_where_something_is_missing(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", str(small / "recipe.yaml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["missing"] == []
    assert told["recipe"] == "small"
    assert {row["part"] for row in told["rows"]} == {"software", "devices", "system", "extras", "recipe"}
    assert cli.main(["doctor", str(small / "recipe.yaml"), "--tokenizer", "nowhere/at/all"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("small: missing: tokenizer")


def test_without_a_recipe_the_command_speaks_of_the_machine_alone(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "tinyllama", "doctor")
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "nothing is missing" in done.stdout
    assert "recipe" not in done.stdout
    assert not list(tmp_path.iterdir())
