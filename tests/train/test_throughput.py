"""Throughput: an MFU refers to the highest peak of the run so far, and checkpoints record peak and hardware."""

import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.train.single_process import SINGLE_PROCESS, load_recipe

from tinyllama import hardware
from tinyllama.distributed import World
from tinyllama.model.flops import flops_per_token
from tinyllama.runs.run_dir import RunDir
from tinyllama.train import throughput
from tinyllama.train.loop import train
from tinyllama.train.throughput import ThroughputMeter

pytest_plugins = ["tests.train.fixtures"]

VOCAB_SIZE = 600


def set_peaks(monkeypatch: pytest.MonkeyPatch, peaks: Iterable[float], device: str = "Some CPU") -> None:
    """Return the next of `peaks` from each timed product, and time a product at every restart."""
    remaining = iter(peaks)
    monkeypatch.setattr(hardware, "peak_flops", lambda device, precision: next(remaining))
    monkeypatch.setattr(hardware, "device_name", lambda _: device)
    monkeypatch.setattr(throughput, "_TIMING_FRACTION", float("inf"))


def peak_of(row: dict[str, Any], flops: float, ranks: int = 1) -> float:
    """Return the peak per rank that a row's MFU refers to."""
    return float(row["tokens_per_second"] * flops / row["mfu"] / ranks)


@pytest.mark.parametrize("ranks", [1, 3])
def test_peak_is_the_fastest_product_so_far(small: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    recipe = load_recipe(small)
    set_peaks(monkeypatch, [3e9, 7e9, 2e9, 9e9, 8e9])
    meter = ThroughputMeter(recipe, VOCAB_SIZE, World(0, ranks, torch.device("cpu")))
    flops = flops_per_token(recipe.model, VOCAB_SIZE, recipe.train.sequence_length)
    peaks = [peak_of(meter.metrics(), flops, ranks)]
    for _ in range(4):
        meter.restart()
        peaks.append(peak_of(meter.metrics(), flops, ranks))
    assert peaks == pytest.approx([3e9, 7e9, 7e9, 9e9, 9e9])
    assert [entry["peak_flops"] for entry in meter.hardware()] == [9e9]


def test_products_take_a_limited_fraction_of_the_time(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_peaks(monkeypatch, [3e9, 5e9])
    monkeypatch.setattr(throughput, "_TIMING_FRACTION", 0.02)
    clock = iter([100.0, 101.0, 150.9, 151.0, 152.0])  # begin and end of a product; no product; begin and end
    frozen = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(throughput, "time", frozen)
    meter, peaks = ThroughputMeter(load_recipe(small), VOCAB_SIZE, SINGLE_PROCESS), []
    for _ in range(2):
        meter.restart()
        peaks += [entry["peak_flops"] for entry in meter.hardware()]
    assert peaks == [3e9, 5e9]


@pytest.mark.parametrize(
    ("device", "peak", "expected"),
    [("A", 3e9, [("A", 5e9)]), ("A", 6e9, [("A", 6e9)]), ("B", 1e9, [("A", 5e9), ("B", 1e9)])],
)
def test_resumed_run_keeps_its_peak_and_another_machine_has_its_own(
    small: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch, device: str, peak: float, expected: list[Any]
) -> None:
    recipe = load_recipe(small, **{"train.tokens": 2 * 384, "checkpoint.every_steps": 1})
    set_peaks(monkeypatch, iter(lambda: 5e9, None), "A")
    run = RunDir(train(recipe))
    run.checkpoint(2).delete()
    set_peaks(monkeypatch, iter(lambda: peak, None), device)
    train(recipe)
    entries = run.checkpoint(2).state()["hardware"]
    assert [(entry["device"], entry["peak_flops"]) for entry in entries] == expected
    flops = flops_per_token(recipe.model, VOCAB_SIZE, recipe.train.sequence_length)
    assert peak_of([*run.metrics()][-1], flops) == pytest.approx(expected[-1][1])


def test_peak_of_a_known_gpu_comes_from_its_data_sheet(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    recipe, world = load_recipe(small, **{"train.precision": "bf16"}), World(0, 8, torch.device("cuda"))
    (entry,) = ThroughputMeter(recipe, VOCAB_SIZE, world).hardware()
    text = hardware.format_hardware(entry)
    assert text.startswith("8 x NVIDIA H100 80GB HBM3; bf16 peak 989 TFLOP/s per GPU")
    known = [entry | {"peak_flops": 2e15}]  # from a checkpoint, which does not count
    assert ThroughputMeter(recipe, VOCAB_SIZE, world, known).hardware() == [entry]


def test_unknown_gpu_has_no_mfu(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Fictional")
    monkeypatch.setattr(hardware, "peak_memory_bytes", lambda device: 0)
    meter = ThroughputMeter(load_recipe(small), VOCAB_SIZE, World(0, 1, torch.device("cuda")))
    assert meter.metrics()["mfu"] is None
    assert "NVIDIA Fictional" in hardware.format_hardware(meter.hardware()[0])


def test_cpu_of_this_machine_has_a_name_and_a_measured_peak(small: Path) -> None:
    (entry,) = ThroughputMeter(load_recipe(small), VOCAB_SIZE, World(1, 2, torch.device("cpu"))).hardware()
    assert entry["device"] and entry["peak_flops"] > 0
    assert {"cores", "threads", "precision", "ranks"} <= entry.keys()
    assert entry["device"] in hardware.format_hardware(entry)
