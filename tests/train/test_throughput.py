"""An MFU is a share of the highest peak that the run has seen, and each checkpoint has that peak and its hardware."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.train.launch import read_metrics
from tests.train.single_process import SINGLE_PROCESS, load_recipe

from tinyllama import hardware
from tinyllama.model.flops import flops_per_token
from tinyllama.runs.checkpoint import checkpoint_folder, read_state
from tinyllama.train import throughput
from tinyllama.train.distributed import World
from tinyllama.train.loop import train
from tinyllama.train.throughput import ThroughputMeter

VOCAB_SIZE = 600


def give(monkeypatch: pytest.MonkeyPatch, peaks: Iterable[float], device: str = "Some CPU") -> None:
    """Let each product that is timed come out as the next of these, and time one at every pause."""
    left = iter(peaks)
    monkeypatch.setattr(hardware, "peak_flops", lambda device, precision: next(left))
    monkeypatch.setattr(hardware, "device_name", lambda _: device)
    monkeypatch.setattr(throughput, "_TIMING_FRACTION", float("inf"))


def peak_of(row: dict[str, Any], flops: float, ranks: int = 1) -> float:
    """The peak that a row's MFU is a share of, for each rank."""
    return float(row["tokens_per_second"] * flops / row["mfu"] / ranks)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_peak_is_the_highest_product_so_far(small: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    recipe = load_recipe(small)
    give(monkeypatch, [3e9, 7e9, 2e9, 9e9, 8e9])
    measured = ThroughputMeter(recipe, VOCAB_SIZE, World(0, ranks, torch.device("cpu")))
    flops = flops_per_token(recipe.model, VOCAB_SIZE, recipe.train.sequence_length)
    found = [peak_of(measured.metrics(), flops, ranks)]
    for _ in range(4):
        measured.restart()
        found.append(peak_of(measured.metrics(), flops, ranks))
    assert found == pytest.approx([3e9, 7e9, 7e9, 9e9, 9e9])
    assert [entry["peak_flops"] for entry in measured.hardware()] == [9e9]


def test_a_product_is_not_timed_at_every_pause(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, [3e9, 5e9])
    monkeypatch.setattr(throughput, "_TIMING_FRACTION", 0.02)
    clock = iter([100.0, 101.0, 150.9, 151.0, 152.0])  # begin and end of the first, no second, begin and end of a third
    monkeypatch.setattr(
        throughput, "time", SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    )
    measured, peaks = ThroughputMeter(load_recipe(small), VOCAB_SIZE, SINGLE_PROCESS), []
    for _ in range(2):
        measured.restart()
        peaks += [entry["peak_flops"] for entry in measured.hardware()]
    assert peaks == [3e9, 5e9]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_peak_and_another_machine_gets_its_own(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(small, **{"checkpoint.keep": 9})
    flops = flops_per_token(recipe.model, VOCAB_SIZE, recipe.train.sequence_length)

    def live(peak: float, device: str) -> list[tuple[str, float]]:
        """Train from step 10, or from the beginning, to the end; the hardware in the last checkpoint."""
        for step in (20, 30, 40):
            shutil.rmtree(checkpoint_folder(tmp_path / "runs/small", step), ignore_errors=True)
        give(monkeypatch, iter(lambda: peak, None), device)
        run = train(recipe)
        known = read_state(checkpoint_folder(run, 40))["hardware"]
        assert peak_of(read_metrics(run)[-1], flops) == pytest.approx(known[-1]["peak_flops"])
        return [(entry["device"], entry["peak_flops"]) for entry in known]

    assert live(5e9, "A") == [("A", 5e9)]
    assert live(3e9, "A") == [("A", 5e9)]
    assert live(6e9, "A") == [("A", 6e9)]
    # from step 10 on again, whose checkpoint knows the first life alone
    assert live(1e9, "B") == [("A", 5e9), ("B", 1e9)]


def test_a_checkpoint_of_an_earlier_version_is_resumed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, [4e9])
    (entry,) = ThroughputMeter(load_recipe(small), VOCAB_SIZE, SINGLE_PROCESS, known=()).hardware()
    assert entry["peak_flops"] == 4e9
    assert {"device", "cores", "threads", "precision", "ranks"} <= entry.keys()


def test_a_gpus_peak_is_its_data_sheets_whatever_an_earlier_version_knew(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    recipe, ranks = load_recipe(small, **{"train.precision": "bf16"}), World(0, 8, torch.device("cuda"))
    (entry,) = ThroughputMeter(recipe, VOCAB_SIZE, ranks).hardware()
    assert hardware.format_hardware(entry) == (
        "8 x NVIDIA H100 80GB HBM3; bf16 peak 989 TFLOP/s per GPU, from its data sheet"
    )
    before = [entry | {"peak_flops": 2e15}]
    assert ThroughputMeter(recipe, VOCAB_SIZE, ranks, before).hardware() == [entry]


def test_a_gpu_that_is_not_known_has_no_mfu(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Fictional")
    monkeypatch.setattr(hardware, "peak_memory_bytes", lambda device: 0)
    measured = ThroughputMeter(load_recipe(small), VOCAB_SIZE, World(0, 1, torch.device("cuda")))
    assert measured.metrics()["mfu"] is None
    assert hardware.format_hardware(measured.hardware()[0]) == "1 x NVIDIA Fictional; fp32 peak not known"


def test_this_machines_cpu_has_a_name_and_a_measured_peak(small: Path) -> None:
    (entry,) = ThroughputMeter(load_recipe(small), VOCAB_SIZE, World(1, 2, torch.device("cpu"))).hardware()
    assert entry["device"] and entry["peak_flops"] > 0
    assert entry["device"] in hardware.format_hardware(entry)
    assert "2 ranks with 1 thread each; fp32 peak " in hardware.format_hardware(entry)
