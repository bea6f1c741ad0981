"""How fast a run goes: what a row of metrics says of a step's time, work and memory."""

import time
from typing import Any

from tinyllama import hardware, plan
from tinyllama.model.llama import PRECISIONS
from tinyllama.recipe import Recipe
from tinyllama.train.parallel import Ranks

_PEAK_HOLDS_SECONDS = 60.0
"""Measuring takes up to a second, and a small model may be saved every few."""


class Meter:
    """Times the steps; what happens between `restart` and the step before it is not a step's time."""

    def __init__(self, recipe: Recipe, vocab_size: int, ranks: Ranks) -> None:
        self.recipe, self.ranks = recipe.train, ranks
        self.flops = plan.flops_per_token(recipe.model, vocab_size, recipe.train.sequence_length)
        self.peak_measured = -_PEAK_HOLDS_SECONDS
        self.restart()

    def restart(self) -> None:
        """Begin to time the next step now; a CPU's peak is measured anew at times, since neighbours come and go."""
        if time.monotonic() - self.peak_measured >= _PEAK_HOLDS_SECONDS:
            self.peak = hardware.peak_flops(self.ranks.device, PRECISIONS[self.recipe.precision])
            self.peak_measured = time.monotonic()
        self.begun = time.perf_counter()

    def row(self) -> dict[str, Any]:
        """Speed, MFU and memory of the step that just ended."""
        speed = self.recipe.batch_tokens / (time.perf_counter() - self.begun)
        self.begun = time.perf_counter()
        return {
            "tokens_per_second": speed,
            "mfu": speed * self.flops / (self.peak * self.ranks.count) if self.peak else None,
            "memory_bytes": hardware.memory_bytes(self.ranks.device),
        }
