"""What this machine really does with a recipe's network: seconds of a micro-batch and of an update.

Trains a few of its layers on random tokens, as the training loop would, and carries the time of a layer on to all of
them: the network need not fit, nor need there be data. A product is timed in between, since neighbours come and go.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tinyllama import hardware, preflight
from tinyllama.hardware import HardwareSpec, measure_cpu_spec, spec_for_device
from tinyllama.model.flops import num_parameters
from tinyllama.model.llama import PRECISIONS, Llama, initialize
from tinyllama.recipe import Recipe
from tinyllama.train.distributed import World
from tinyllama.train.optimizer import build_optimizers, clip_grad_norm, optimizer_step, zero_grad
from tinyllama.train.setup import build_model

_LAYERS = (1, 3)
_ROUNDS = 5


@dataclass(frozen=True)
class Measured:
    """Medians over a few rounds."""

    micro_batch_seconds: float
    update_seconds: float
    peak_flops: float
    """Of products timed between the rounds, on a CPU; of the data sheet on a GPU."""


def this_machine() -> HardwareSpec | None:
    """The row of this machine's GPU, if it has one that is known; else its CPU."""
    if torch.cuda.is_available():
        return spec_for_device(torch.cuda.get_device_name())
    return measure_cpu_spec()


def measure_speed(recipe: Recipe, vocab_size: int, ranks: int) -> Measured:
    """Time the recipe's network on this machine's first GPU, or its CPU, with the micro-batch of one of `ranks`."""
    preflight.check_float8(recipe)
    hardware.tune_malloc()
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    rows = recipe.train.effective_micro_batch_size(ranks)
    layers = sorted({min(count, recipe.model.layers) for count in _LAYERS})
    probes = [_TimedModel(recipe, vocab_size, count, rows, device) for count in layers]
    times: list[list[float]] = []
    for _ in range(_ROUNDS):
        peak = hardware.peak_flops(device, PRECISIONS[recipe.train.precision]) or 0.0
        times.append([peak, *(seconds for probe in probes for seconds in (probe.micro_batch(), probe.update()))])
    peak, *found = (statistics.median(column) for column in zip(*times, strict=True))
    micro = _extrapolate(layers, found[0::2], recipe.model.layers)
    shapes = [recipe.model.model_copy(update={"layers": count}) for count in layers]
    sizes = [num_parameters(shape, vocab_size) for shape in shapes]
    update = _extrapolate(sizes, found[1::2], num_parameters(recipe.model, vocab_size))
    return Measured(micro, update, peak)


def _extrapolate(places: list[int], seconds: list[float], to: int) -> float:
    """The straight line through the first and the last measurement, at `to`."""
    if len(places) == 1:
        return seconds[0]
    slope = (seconds[-1] - seconds[0]) / (places[-1] - places[0])
    return seconds[-1] + slope * (to - places[-1])


class _TimedModel:
    """A network of a few of the recipe's layers that can be timed again and again."""

    def __init__(self, recipe: Recipe, vocab_size: int, layers: int, rows: int, device: torch.device) -> None:
        shape = recipe.model.model_copy(update={"layers": layers})
        self.recipe = recipe.model_copy(update={"model": shape})
        self.model: Llama = build_model(self.recipe, vocab_size, World(0, 1, device))
        initialize(self.model, recipe.seed)
        self.optimizers = build_optimizers(self.model, recipe.train.optimizer)
        length = recipe.train.sequence_length
        self.ids = torch.randint(vocab_size, (rows, length + 1), device=device)
        self.micro_batch()  # compiles
        self.update()  # gives the optimiser its state

    def micro_batch(self) -> float:
        """Seconds of a forward and a backward pass."""
        return _seconds(lambda: self.model.loss(self.ids[:, :-1], self.ids[:, 1:]).backward())

    def update(self) -> float:
        """Seconds of clipping and updating, with the gradients that the last micro-batch left."""

        def run() -> None:
            clip_grad_norm(self.model, self.recipe.train.optimizer.max_gradient_norm)
            optimizer_step(self.optimizers, 0.0)
            zero_grad(self.optimizers)

        return _seconds(run)


def _seconds(call: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun
