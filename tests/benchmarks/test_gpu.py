"""benchmarks/gpu.py: limits of its parts, failures that do not spread, its table, and its parts on a CPU."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tinyllama.distributed import World
from tinyllama.model.llama import Llama
from tinyllama.recipe import Recipe
from tinyllama.train.setup import enable_float8

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    yield importlib.import_module("gpu")
    sys.modules.pop("gpu")


def test_all_parts_together_take_at_most_eight_minutes(gpu):
    assert sum(part.limit_seconds for part in gpu.PARTS.values()) <= 480


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("complete", ""),
        ("failed_check", ""),
        ("error", "exit status 1: ValueError: the second check failed"),
        ("crash", "signal SIGSEGV"),
        ("hang", "stopped after its limit of 3 s"),
    ],
)
def test_a_part_keeps_its_rows_and_names_its_problem(gpu, tmp_path, function, problem):
    part = gpu.Part("gpu_example_parts", function, 3 if function == "hang" else 60, "Example")
    result = gpu.run_part("example", part, tmp_path, "cpu")
    assert result["problem"].startswith(problem)
    assert bool(result["problem"]) == bool(problem)
    assert result["rows"][0]["check"] == "first"
    assert gpu.has_passed(result) == (function == "complete")
    if function == "complete":
        table = gpu.markdown_section(result)
        assert "| check | found | passed | note |" in table
        assert "| second |  |  | a\\|b |" in table


def test_parts_import_no_package_that_the_bundle_lacks():
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("bundled_imports.py")],
        env=os.environ | {"PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert {"pyarrow", "datatrove", "matplotlib"} <= set(ended.stdout.splitlines())


def test_torchao_selects_one_of_the_four_matrices_of_the_1b_model(gpu, monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    gpu_speed = importlib.import_module("gpu_speed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    shape = Recipe.load("tinyllama-1.1b").model.model_copy(update={"layers": 1})
    with torch.device("meta"), ExitStack() as stack:
        model = Llama(shape, 32_000, torch.bfloat16)
        gpu_speed.select_float8_matrices(stack)
        enable_float8(model, World(0, 1, torch.device("cuda")))
    converted = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert converted == ["blocks.0.ffn.gate_up"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_parts_run_on_a_cpu(gpu, monkeypatch, tmp_path):
    """Runs all parts except the three longest, which `make check-gpu GPU_FLAGS=--dry-run` runs too."""
    parts = [name for name in gpu.PARTS if name not in ("training", "speed", "peers")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path), "--parts", *parts])
    status = gpu.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(result["part"], result["problem"]) for result in results] == [(name, "") for name in parts]
    assert all(gpu.has_passed(result) for result in results)
    assert status == 0
