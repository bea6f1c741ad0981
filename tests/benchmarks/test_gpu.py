"""benchmarks/gpu.py: limits of its parts, failures that do not spread, its table, and its parts on a CPU."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from tinyllama.distributed import World
from tinyllama.errors import InputError
from tinyllama.model.llama import Llama
from tinyllama.recipe import Recipe
from tinyllama.train.setup import enable_float8

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEAKS = {"bf16": 1e12, "fp32": 1e12}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    yield importlib.import_module("gpu")
    sys.modules.pop("gpu")


def test_all_parts_together_take_at_most_eight_minutes(gpu):
    assert sum(part.limit_seconds for part in (gpu.INPUTS, *gpu.PARTS.values())) <= 480


def test_a_part_may_use_the_time_that_earlier_parts_did_not_use(gpu, monkeypatch, tmp_path):
    parts = {"a": gpu.Part("", "", 30, ""), "b": gpu.Part("", "", 20, ""), "c": gpu.Part("", "", 10, "")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    clock, remaining = 1000.0, {}

    def run_part(name, part, out, device, deadline):
        nonlocal clock
        remaining[name] = deadline - clock
        clock += {"a": 5.0, "b": remaining[name], "c": 0.0}[name]
        return {"part": name, "title": name, "note": "", "seconds": 1.0, "problem": "", "rows": []}

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--parts", *parts])
    assert gpu.main() == 0
    assert remaining == {"a": 30, "b": 45, "c": 10}
    assert json.loads((tmp_path / "results.json").read_text())["seconds"] == 50


def test_missing_packages_end_the_command_before_its_parts(tmp_path):
    command = [sys.executable, "-S", BENCHMARKS / "gpu.py", "--out", tmp_path / "out"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"{sys.executable}: cannot import torch")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("complete", ""),
        ("failed_check", ""),
        ("nan", ""),
        ("error", "exit status 1: ValueError: the second check failed"),
        ("crash", "signal SIGSEGV"),
        ("unnamed_signal", f"signal {signal.SIGRTMIN + 3}"),
        ("partial_row", "signal SIGKILL"),
        ("hang", "stopped at its limit, after 3 s"),
    ],
)
def test_a_part_keeps_its_rows_and_names_its_problem(gpu, tmp_path, function, problem):
    part = gpu.Part("gpu_example_parts", function, 0, "Example")
    deadline = time.monotonic() + (3 if function == "hang" else 60)
    result = gpu.run_part("example", part, tmp_path, "cpu", deadline)
    assert result["problem"].startswith(problem)
    assert bool(result["problem"]) == bool(problem)
    assert [row["check"] for row in result["rows"]] == ["first", "second"] if function == "complete" else ["first"]
    assert gpu.has_passed(result) == (function == "complete")
    if function == "complete":
        table = gpu.markdown_section(result)
        assert "| check | found | passed | note |" in table
        assert "| second |  |  | a\\|b |" in table


def test_a_nan_fails_each_check(gpu):
    correctness, training = importlib.import_module("gpu_correctness"), importlib.import_module("gpu_training")
    nan = float("nan")
    assert all(math.isnan(correctness.largest(errors)) for errors in ((0.1, nan), (nan, 0.1), (0.1, nan, 0.2)))
    one = correctness.Outcome(torch.ones(2), 1.0, torch.ones(2))
    assert correctness.compare(one, one, 0.1)["passed"]
    for outcome in (
        correctness.Outcome(torch.tensor([1.0, nan]), 1.0, torch.ones(2)),
        correctness.Outcome(torch.ones(2), nan, torch.ones(2)),
        correctness.Outcome(torch.ones(2), 1.0, torch.tensor([1.0, nan])),
    ):
        assert not correctness.compare(outcome, one, 0.1)["passed"]
    row = gpu.json_row({"error": nan, "passed": True})
    assert row == {"error": "nan", "passed": False}
    assert gpu.json_row({"ms": nan}) == {"ms": "nan"}
    assert training.attempt("check", lambda: {"passed": 1 / 0}) == {
        "check": "check", "passed": False, "found": "ZeroDivisionError: division by zero",
    }  # fmt: skip


def test_losses_of_runs_that_are_not_finite_or_not_there_fail_the_comparison(gpu, monkeypatch, tmp_path):
    training = importlib.import_module("gpu_training")
    monkeypatch.chdir(tmp_path)
    runs: dict[str, Future[int]] = {}
    found: dict[str, list[float | None]] = {"ours": [2, 1], "equal": [2, 1], "nan": [2, None], "short": [2]}
    for name, values in found.items():
        path = tmp_path / "runs" / name / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"loss": value}) + "\n" for value in values))
        runs[name] = Future()
        runs[name].set_result(training.STEPS)
    runs["failed"] = Future()
    runs["failed"].set_exception(RuntimeError("exit status 2"))
    outcomes = {
        name: training.attempt("", partial(training.compare_losses, runs, name, "ours", 1e-3))["passed"]
        for name in runs
    }
    assert outcomes == {"ours": True, "equal": True, "nan": False, "short": False, "failed": False}


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (RuntimeError("No available kernel. Aborting execution."), {"flash": False, "cuDNN": None}),
        (RuntimeError("CUDA error: an illegal memory access"), {"flash": False, "cuDNN": False}),
        (torch.OutOfMemoryError("CUDA out of memory"), {"flash": False, "cuDNN": False}),
    ],
)
def test_only_an_optional_kernel_may_be_unavailable(gpu, monkeypatch, error, row):
    correctness = importlib.import_module("gpu_correctness")
    kernels, reference = iter(["reference"]), correctness.Outcome(torch.ones(1), 1.0, torch.ones(1))

    def compute(model, ids):
        if next(kernels, None):
            return reference
        raise type(error)(*error.args)  # the traceback of `error` would keep the model in memory

    monkeypatch.setattr(correctness, "compute", compute)
    monkeypatch.setattr(correctness, "TOLERANCES", {torch.bfloat16: 0.03})
    rows = {found["kernel"]: found.get("passed") for found in correctness.attention("cpu")}
    assert {name: rows[name] for name in row} == row


def test_an_error_of_a_configuration_fails_its_check_unless_it_is_expected(gpu):
    gpu_speed = importlib.import_module("gpu_speed")
    assert gpu_speed.failure(RuntimeError("recompilation"))["passed"] is False
    assert "passed" not in gpu_speed.failure(torch.OutOfMemoryError("out of memory"))
    assert "passed" not in gpu_speed.failure(InputError("train.float8: not supported"))


def test_no_model_of_a_configuration_remains_in_memory():
    """Run in a separate process: after FSDP, other tests cannot train in a fork of the process."""
    program = Path(__file__).with_name("models_in_memory.py")
    done = subprocess.run(
        [sys.executable, program],
        env=os.environ | {"PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["passed: True, models in memory: [None]"], done.stderr


def test_configurations_that_would_not_end_in_time_are_not_started(gpu, monkeypatch):
    gpu_speed = importlib.import_module("gpu_speed")
    seconds = iter([60.0, 20.0, 10.0, 20.0, 20.0, 20.0])
    clock = 0.0

    def measure(*_):
        nonlocal clock
        clock += next(seconds)
        return {}

    monkeypatch.setattr(gpu_speed, "measure", measure)
    monkeypatch.setattr(gpu_speed.time, "monotonic", lambda: clock)
    monkeypatch.setattr(gpu_speed, "product_flops", lambda *_: 1.0)
    monkeypatch.setattr(gpu_speed, "DEADLINE", 135.0)
    rows = list(gpu_speed.speed("cpu"))
    assert [row.get("seconds") for row in rows] == [60, 20, 10, 20, 20, *[None] * (len(rows) - 5)]


def test_kernels_that_the_loss_starts_belong_to_the_loss(gpu):
    gpu_speed = importlib.import_module("gpu_speed")

    def event(name: str, start: int, end: int, is_user_annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            time_range=SimpleNamespace(start=start, end=end),
            is_user_annotation=is_user_annotation,
            self_device_time_total=end - start,
            device_type=DeviceType.CUDA,
        )

    events = [
        event("flash_fwd", 0, 1000), event("triton_red_scaled_dot_product", 1000, 3000), event("nvjet_tst", 3000, 6000),
        event("loss", 6000, 9000, True), event("nvjet_tst", 6000, 8000), event("softmax", 8000, 9000),
        event("vectorized_gather", 9000, 9500),
    ]  # fmt: skip
    times = {name: ms for name, ms in gpu_speed.group_times(events, "cuda").items() if ms}
    assert times == {"attention": 1, "fused by torch.compile": 2, "matrix products": 3, "loss": 3, "other": 0.5}


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
def test_parts_run_on_a_cpu(gpu, monkeypatch, tmp_path):
    """Runs the two shortest parts; `make check-gpu GPU_FLAGS=--dry-run` runs all parts."""
    parts = ["environment", "profile"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path), "--parts", *parts])
    status = gpu.main()
    run = json.loads((tmp_path / "results.json").read_text())
    assert run["tinyllama"] == version("tinyllama")
    results = run["parts"]
    assert [(result["part"], result["problem"]) for result in results] == [(name, "") for name in parts]
    assert all(gpu.has_passed(result) for result in results)
    assert status == 0
