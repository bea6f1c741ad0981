"""Properties of this machine on which a drafted recipe depends: speed, memory, precision and installed libraries."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch

from tinyllama.errors import InputError, warn_once
from tinyllama.hardware import HardwareSpec, measure_cpu_spec, native_precision, spec_for_device
from tinyllama.plan.estimate import Assumptions, estimate
from tinyllama.plan.measure import measure_speed
from tinyllama.recipe import Recipe
from tinyllama.release.formats import LIBRARIES, check_format_libraries

_TASK = "hellaswag"
_UNKNOWN_GPU = HardwareSpec("unknown GPU", 50e12, 25e12, 8e9, 10e9, 12.5e9, "assumed for the first of two estimates")


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that a recipe depends on."""

    hardware: HardwareSpec
    precision: str
    """`bf16`, or `fp16` or `fp32` if bf16 is slower here."""
    formats: tuple[str, ...]
    """Formats of releases whose libraries are installed."""
    missing_formats: tuple[str, ...]
    tasks: tuple[str, ...]
    """Evaluation tasks that the installed libraries can score; the first evaluation downloads missing items."""
    measure: Callable[[Recipe, int], float]
    """Function that returns the tokens per second of a recipe with a vocabulary size."""


def this_machine() -> Machine:
    """Return the properties of this machine; on a CPU, this measures the speed of matrix products for a second."""
    formats, missing = [], []
    for name in LIBRARIES:
        try:
            check_format_libraries([name])
            formats.append(name)
        except InputError:
            missing.append(name)
    hardware, precision = _hardware()
    tasks = (_TASK,) if find_spec("lm_eval") else ()
    return Machine(hardware, precision, tuple(formats), tuple(missing), tasks, measured_tokens_per_second)


def _hardware() -> tuple[HardwareSpec, str]:
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        spec = replace(spec_for_device(gpu.name) or _UNKNOWN_GPU, memory_bytes=gpu.total_memory)
        return spec, native_precision((gpu.major, gpu.minor))
    cpu = measure_cpu_spec()
    return cpu, "bf16" if cpu.bf16_flops >= cpu.fp32_flops else "fp32"  # without bf16 instructions, fp32 is faster


def measured_tokens_per_second(recipe: Recipe, vocab_size: int) -> float:
    """Measure a few layers of a recipe's model on this machine, and return its training speed in tokens per second.

    Prints a warning if other programs use the processor.
    """
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        problem = f"the load average is {load:.1f} on {cores} cores, so the measured speed is probably too low"
        warn_once(f"init: {problem}; run the command again when other programs have ended")
    micro_batch, update, _ = measure_speed(recipe, vocab_size, 1)
    train = recipe.train
    micro_batches = train.batch_sequences / train.effective_micro_batch_size(1)
    return train.batch_tokens / (micro_batches * micro_batch + update)


def largest_micro_batch(recipe: Recipe, vocab_size: int, hardware: HardwareSpec) -> int:
    """Return the recipe's micro-batch size, or the largest one that fits into memory; 0 if none fits."""
    figures = estimate(recipe, vocab_size, hardware, Assumptions()).figures
    fits = figures["memory_fits"]
    return int(figures["micro_batch_sequences"] if fits else figures["largest_micro_batch_sequences"] or 0)
