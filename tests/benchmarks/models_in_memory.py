"""Measures a sharded configuration of check-gpu on a CPU, and prints the models that remain in memory."""

import importlib
import weakref

import torch
from tests.benchmarks.test_gpu import PEAKS

from tinyllama.model.llama import Llama

gpu_speed = importlib.import_module("gpu_speed")
timed_model, release_memory = gpu_speed.timed_model, gpu_speed.release_memory
models: list["weakref.ref[Llama]"] = []
remaining: list[Llama | None] = []


def _record(*arguments):
    timed = timed_model(*arguments)
    models.append(weakref.ref(timed.model))
    return timed


def _release_and_check():
    release_memory()
    remaining.extend(model() for model in models)


gpu_speed.timed_model, gpu_speed.release_memory = _record, _release_and_check  # type: ignore[attr-defined]
changes = {"sharded": True}
recipe = gpu_speed.load_recipe("tinyllama-1.1b", "cpu", changes)
row = gpu_speed.measure(recipe, torch.device("cpu"), PEAKS, changes)
print(f"passed: {row['passed']}, models in memory: {remaining}")
