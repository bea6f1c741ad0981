"""Training speed of a recipe's model on this machine: time per micro-batch and per optimizer step, in seconds.

The measurement trains a few layers on random tokens and extrapolates the times to all layers. The complete model need
not fit into memory, and no data is needed. Each round also measures the FLOP/s of matrix products, so other jobs on the
machine slow down both measurements and change the MFU only a little.
"""

import statistics
import time
from collections.abc import Callable

import torch

from tinyllama import hardware, preflight
from tinyllama.distributed import World, begin_micro_batch, kept_cast_weights, select_device
from tinyllama.hardware import HardwareSpec, measure_cpu_spec, spec_for_device
from tinyllama.model.flops import num_parameters
from tinyllama.model.llama import PRECISIONS, Llama, initialize
from tinyllama.recipe import Recipe
from tinyllama.train.setup import (
    Float8Scaling,
    build_model,
    build_optimizers,
    clip_grad_norm,
    optimizer_step,
    run_keeps_weights,
)

_LAYERS = (1, 3)
_ROUNDS = 5


def detect_hardware() -> HardwareSpec | None:
    """Return the specification of this machine's GPU (None for an unknown GPU), or of its CPU if there is no GPU.

    Raises InputError if torch cannot use the machine's GPU.
    """
    device = select_device(0)
    return measure_cpu_spec() if device.type == "cpu" else spec_for_device(hardware.device_name(device))


def measure_speed(recipe: Recipe, vocab_size: int, ranks: int) -> tuple[float, float, float]:
    """Measure the model's training speed on this machine's first GPU, or on its CPU if there is no GPU.

    Return medians over a few rounds: the seconds per micro-batch, the seconds per optimizer step, and the FLOP/s of
    matrix products (for a GPU, the peak from the data sheet). The micro-batch has the size that each rank has in a run
    with `ranks` ranks.
    """
    preflight.check_float8(recipe)
    hardware.tune_malloc()
    device = select_device(0)
    layers = sorted({min(count, recipe.model.layers) for count in _LAYERS})
    shapes = [recipe.model.model_copy(update={"layers": count}) for count in layers]
    models = [TimedModel(recipe.model_copy(update={"model": shape}), vocab_size, ranks, device) for shape in shapes]
    rounds: list[list[float]] = []
    for _ in range(_ROUNDS):
        peak = hardware.peak_flops(device, PRECISIONS[recipe.train.precision]) or 0.0
        rounds.append([peak, *(seconds for model in models for seconds in (model.micro_batch(), model.update()))])
    peak, *medians = (statistics.median(column) for column in zip(*rounds, strict=True))
    micro_batch = _extrapolate(layers, medians[0::2], recipe.model.layers)
    sizes = [num_parameters(shape, vocab_size) for shape in shapes]
    update = _extrapolate(sizes, medians[1::2], num_parameters(recipe.model, vocab_size))
    return micro_batch, update, peak


def _extrapolate(sizes: list[int], seconds: list[float], size: int) -> float:
    """Return the time for `size` in seconds, extrapolated linearly from the first and the last measurement."""
    if len(sizes) == 1:
        return seconds[0]
    slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    return seconds[-1] + slope * (size - sizes[-1])


class TimedModel:
    """A model with random weights whose micro-batch and optimizer step can be timed repeatedly."""

    def __init__(
        self,
        recipe: Recipe,
        vocab_size: int,
        ranks: int,
        device: torch.device,
        float8_scaling: Float8Scaling = "rowwise",
    ) -> None:
        """Build, initialize and compile the model; the micro-batch has the size of a run with `ranks` ranks."""
        self.train = recipe.train
        world = World(0, 1, device)
        self.keeps_weights = run_keeps_weights(recipe, vocab_size, world)
        self.model: Llama = build_model(recipe, vocab_size, world, float8_scaling, self.keeps_weights)
        initialize(self.model, recipe.seed)
        self.optimizers = build_optimizers(self.model, self.train.optimizer)
        sequences = self.train.effective_micro_batch_size(ranks)
        self.ids = torch.randint(vocab_size, (sequences, self.train.sequence_length + 1), device=device)
        self.micro_batch()  # compiles
        self.update()  # initialises the optimizer's state

    def micro_batch(self, is_last: bool = True) -> float:
        """Return the time of a forward and a backward pass, in seconds, without casts that a step does only once.

        `is_last` sets whether FSDP communicates as in the last micro-batch of a step; see `begin_micro_batch`.
        """
        begin_micro_batch(self.model, is_last, self.keeps_weights)
        with kept_cast_weights(self.model, self.keeps_weights):
            return time_call(lambda: self.model.loss(self.ids[:, :-1], self.ids[:, 1:]).backward())

    def update(self) -> float:
        """Return the seconds of a step's single casts, gradient clipping and an optimizer step.

        The gradients are those since the last update; the last micro-batch before it must have had `is_last`.
        """

        def run() -> None:
            with kept_cast_weights(self.model, self.keeps_weights):
                pass
            clip_grad_norm(self.model, self.train.optimizer.max_gradient_norm)
            optimizer_step(self.optimizers, 0.0)
            self.model.zero_grad()

        return time_call(run)


def time_call(call: Callable[[], object]) -> float:
    """Return the time of a call in seconds, including its work on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
