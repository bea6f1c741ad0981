"""Throughput of training: tokens per second, MFU and memory of each step, and the hardware that the run used.

A CPU's peak FLOP/s is that of the fastest matrix product timed so far, including those in the run's earlier processes.
The newest measurement alone is not enough: if another job slowed down the matrix product, the MFU would be too high.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from tinyllama import hardware
from tinyllama.distributed import World
from tinyllama.model.flops import flops_per_token
from tinyllama.model.llama import PRECISIONS
from tinyllama.recipe import Recipe

_TIMING_FRACTION = 0.02
"""Maximum fraction of a run's time for timing matrix products. Without this limit, a run that saves every few seconds
would time a matrix product after each save."""


class ThroughputMeter:
    """Timer of the steps. The time between the end of a step and a call of `restart` is not counted."""

    def __init__(self, recipe: Recipe, vocab_size: int, world: World, known: Iterable[Mapping[str, Any]] = ()) -> None:
        """Start the timer; `known` is the result of `hardware()` from the checkpoint that the run resumed from."""
        self.recipe, self.world = recipe.train, world
        self.flops = flops_per_token(recipe.model, vocab_size, recipe.train.sequence_length)
        self.entries = [dict(entry) for entry in known]
        here = hardware.hardware_record(world.device, world.size)
        here |= {"precision": recipe.train.precision, "peak_flops": None}
        self.entry = next((entry for entry in self.entries if entry | {"peak_flops": None} == here), here)
        if self.entry is here:
            self.entries.append(here)
        self.next_timing = 0.0
        self.restart()

    def restart(self) -> None:
        """Restart the timer. Occasionally, measure the peak FLOP/s first; for a CPU, keep the highest measurement."""
        start = time.monotonic()
        if start >= self.next_timing:
            measured = hardware.peak_flops(self.world.device, PRECISIONS[self.recipe.precision])
            previous = self.entry["peak_flops"] if self.world.device.type == "cpu" else None
            self.entry["peak_flops"] = max(filter(None, (previous, measured)), default=None)
            end = time.monotonic()
            self.next_timing = end + (end - start) / _TIMING_FRACTION
        self.step_start = time.perf_counter()

    def metrics(self) -> dict[str, Any]:
        """Return the tokens per second, MFU and memory of the last step, and start the timer for the next step."""
        now, peak = time.perf_counter(), self.entry["peak_flops"]
        tokens_per_second = self.recipe.batch_tokens / (now - self.step_start)
        self.step_start = now
        return {
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self.flops / (peak * self.world.size) if peak else None,
            "memory_bytes": hardware.peak_memory_bytes(self.world.device),
        }

    def hardware(self) -> list[dict[str, Any]]:
        """Return all hardware that the run used, in order of first use, with the peak per rank in FLOP/s."""
        return [dict(entry) for entry in self.entries]
