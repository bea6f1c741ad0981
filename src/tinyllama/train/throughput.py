"""How fast a run goes: what a row of metrics says of a step's time, work and memory; and the hardware it ran on.

The peak of a CPU is the fastest matrix product timed in the run so far, in earlier processes of the run as well. The
newest product would not do: one that was timed while another job ran makes the MFU too high.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from tinyllama import hardware
from tinyllama.model.flops import flops_per_token
from tinyllama.model.llama import PRECISIONS
from tinyllama.recipe import Recipe
from tinyllama.train.distributed import World

_TIMING_SHARE = 0.02
"""Share of a run's time that timing products may take; a small model may be saved every few seconds."""


class ThroughputMeter:
    """Times the steps; what happens between `restart` and the step before it is not a step's time.

    `before` is `hardware()` of the checkpoint that the run resumed from.
    """

    def __init__(self, recipe: Recipe, vocab_size: int, ranks: World, before: Iterable[Mapping[str, Any]] = ()) -> None:
        self.recipe, self.ranks = recipe.train, ranks
        self.flops = flops_per_token(recipe.model, vocab_size, recipe.train.sequence_length)
        self.entries = [dict(entry) for entry in before]
        here = hardware.hardware_record(ranks.device, ranks.count)
        here |= {"precision": recipe.train.precision, "peak_flops": None}
        if not any(entry | {"peak_flops": None} == here for entry in self.entries):
            self.entries.append(here)
        self.entry = next(entry for entry in self.entries if entry | {"peak_flops": None} == here)
        self.next_timing = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin to time the next step now; measure a CPU's peak again at times, and keep the highest."""
        begun = time.monotonic()
        if begun >= self.next_timing:
            measured = hardware.peak_flops(self.ranks.device, PRECISIONS[self.recipe.precision])
            before = self.entry["peak_flops"] if self.ranks.device.type == "cpu" else None
            self.entry["peak_flops"] = max(filter(None, (before, measured)), default=None)
            ended = time.monotonic()
            self.next_timing = ended + (ended - begun) / _TIMING_SHARE
        self.begun = time.perf_counter()

    def row(self) -> dict[str, Any]:
        """Speed, MFU and memory of the step that just ended."""
        speed, peak = self.recipe.batch_tokens / (time.perf_counter() - self.begun), self.entry["peak_flops"]
        self.begun = time.perf_counter()
        return {
            "tokens_per_second": speed,
            "mfu": speed * self.flops / (peak * self.ranks.count) if peak else None,
            "memory_bytes": hardware.peak_memory_bytes(self.ranks.device),
        }

    def hardware(self) -> list[dict[str, Any]]:
        """Everything the run trained on so far, in the order of first use, with the peak of each rank in FLOP/s."""
        return [dict(entry) for entry in self.entries]
