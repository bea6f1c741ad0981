"""Training speed, kernel times and inference speed on a GPU, for benchmarks/gpu.py.

A step has 131,072 tokens per GPU, as in the TinyLlama recipe on 16 GPUs. Its time is the time of its micro-batches and
of one optimizer step, each measured separately. MFU counts causal attention (`tinyllama.model.flops.flops_per_token`).
The columns of the plan are the predictions of `tinyllama plan` for the same configuration, except for the sharded
model: the plan of one GPU has no FSDP.
"""

import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from gpu_correctness import one_rank_group, product_flops
from torch.autograd import DeviceType
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from tinyllama import hardware
from tinyllama.distributed import World
from tinyllama.errors import InputError, silence_torchao, summarize_error
from tinyllama.hardware import HardwareSpec
from tinyllama.model import generation, llama
from tinyllama.model.attention import INFERENCE_KERNELS
from tinyllama.model.flops import LLAMA_2_VOCAB_SIZE, flops_per_token
from tinyllama.model.llama import PRECISIONS, Llama
from tinyllama.plan import measure as plan_measure
from tinyllama.plan.estimate import Assumptions, estimate
from tinyllama.plan.measure import TimedModel, detect_hardware, time_call
from tinyllama.recipe import Recipe
from tinyllama.train import setup
from tinyllama.train.setup import Float8Scaling

STEP_TOKENS = 131_072
ROUNDS = 4
DEADLINE = float(os.environ.get("GPU_DEADLINE", "inf")) - 10
"""Time of the system's monotonic clock, ten seconds before gpu.py kills the part."""
TINY = {"model.dim": 128, "model.layers": 2, "model.heads": 4, "model.kv_heads": 2, "model.ffn_dim": 256}
TINY |= {"model.context_length": 32, "train.sequence_length": 32}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "base: micro-batch 8, compiled": {},
    "micro-batch 16": {"train.micro_batch_sequences": 16},
    "float8, one scale per tensor": {"train.float8": True, "scaling": "tensorwise"},
    "float8, one scale per row": {"train.float8": True},
    "float8, one scale per row, torchao's selection of matrices": {"train.float8": True, "select": True},
    "FSDP2 on one rank": {"sharded": True},
    "checkpointing: selective": {"parallel.activation_checkpointing": "selective"},
    "checkpointing: full": {"parallel.activation_checkpointing": "full"},
    "not compiled": {"train.compile": False},
    "deterministic": {"train.deterministic": True},
    "Muon": {"train.optimizer.name": "muon"},
    "micro-batch 4": {"train.micro_batch_sequences": 4},
}
"""Changes to the base configuration, the most valuable first. Names without a dot are not fields of the recipe."""
GROUPS = {
    "fused by torch.compile": ("triton_",),
    "attention": ("flash", "fmha", "sdpa", "attention", "bmm"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "aten::mm", "scaled_mm"),
    "optimizer and clipping": ("multi_tensor", "adam", "foreach", "norm"),
}
"""Parts of kernel names, in order of precedence. All other kernels are `other`. All kernels that the output head's loss
starts are `loss`, also its matrix products."""
_TEXT_LENGTHS = (97, 211, 340, 512, 733, 1024)


def speed(device: str) -> Iterator[dict[str, Any]]:
    """Yield speed, memory and predictions of each configuration of the 1.1B model."""
    # torch reads the variable once, and requires this value for train.deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    where, durations = torch.device(device), list[float]()
    peaks = {name: product_flops(where, PRECISIONS[name]) for name in ("bf16", "fp32")}
    for name, changes in CONFIGURATIONS.items():
        started = time.monotonic()
        # The first configuration also loads the compiler, so its duration does not predict those of the others.
        if started + (statistics.median(durations[1:]) if durations[1:] else 0.0) > DEADLINE:
            yield {"configuration": name, "note": "not run: out of time"}
            continue
        recipe = load_recipe("tinyllama-1.1b", device, changes, compiles_on_cpu=not changes)
        row = {"configuration": name} | measure(recipe, where, peaks, changes)
        durations.append(time.monotonic() - started)
        yield row | {"seconds": durations[-1]}


def small(device: str) -> Iterator[dict[str, Any]]:
    """Yield the speed of the 120M model."""
    where = torch.device(device)
    peaks = {name: product_flops(where, PRECISIONS[name]) for name in ("bf16", "fp32")}
    yield {"configuration": "tinyllama-120m"} | measure(load_recipe("tinyllama-120m", device, {}), where, peaks, {})


def load_recipe(name: str, device: str, changes: Mapping[str, Any], compiles_on_cpu: bool = False) -> Recipe:
    """Return a bundled recipe with 131,072 tokens per step; on a CPU, with a tiny model."""
    fields = {key: value for key, value in changes.items() if "." in key}
    if device == "cpu":
        fields |= TINY | {"train.compile": compiles_on_cpu or bool(fields.get("train.float8"))}
    recipe = Recipe.load(name, fields)
    sequences = STEP_TOKENS // recipe.train.sequence_length if device == "cuda" else 16
    return Recipe.load(name, fields | {"train.batch_sequences": sequences})


def measure(
    recipe: Recipe, device: torch.device, peaks: Mapping[str, float], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one configuration's speed, memory and predictions, or the reason why it does not run.

    A failure is a failed check, as are a recompilation, an operation that waits for the GPU, and a missing compiler.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        micro_batch, rest, synchronisations = time_configuration(recipe, device, changes)
    except Exception as error:  # an unsupported or too large configuration must not end the others
        return failure(error)
    finally:
        memory = hardware.peak_memory_bytes(device)
        release_memory()
    micro_batches = recipe.train.batch_sequences // recipe.train.effective_micro_batch_size(1)
    tokens_per_second = recipe.train.batch_tokens / (micro_batches * micro_batch + rest)
    flops = tokens_per_second * flops_per_token(recipe.model, LLAMA_2_VOCAB_SIZE, recipe.train.sequence_length)
    spec = hardware_spec()
    row = {
        "tokens/s": tokens_per_second,
        "MFU % of data sheet": 100 * flops / spec.peak_flops(recipe.train.precision) if spec else None,
        "MFU % of measured product": 100 * flops / peaks[recipe.train.precision],
        "rest of the step ms": 1e3 * rest,
        "peak GB": memory / 1e9,
        "synchronisations": synchronisations,
        "passed": synchronisations == 0,
    }
    if recipe.train.compile and not hardware.can_compile(device):
        row |= {"passed": False, "note": "not compiled: no compiler or no Python headers"}
    if spec and not changes.get("sharded"):
        figures = estimate(recipe, LLAMA_2_VOCAB_SIZE, spec, Assumptions()).figures
        row |= {"plan tokens/s": figures["tokens_per_second"], "plan GB": figures["memory_bytes_per_gpu"] / 1e9}
    return row


@cache
def hardware_spec() -> HardwareSpec | None:
    """Return the hardware spec of this machine's GPU or CPU; a CPU is measured once."""
    return detect_hardware()


def time_configuration(recipe: Recipe, device: torch.device, changes: Mapping[str, Any]) -> tuple[float, float, int]:
    """Return the times of `time_step`, and the number of operations in a step that wait for the GPU.

    No reference to the model remains when the function returns.
    """
    with ExitStack() as stack:
        if changes.get("select"):
            select_float8_matrices(stack)
        if changes.get("sharded"):
            shard_on_one_rank(stack, device)
        if recipe.train.deterministic:
            stack.callback(torch.use_deterministic_algorithms, False)
            torch.use_deterministic_algorithms(True)
        timed = timed_model(recipe, device, changes.get("scaling", "rowwise"))
        with torch.compiler.set_stance("fail_on_recompile"):
            micro_batch, rest = time_step(timed)
        return micro_batch, rest, sum(map(count_synchronisations, (timed.micro_batch, timed.update)))


def failure(error: Exception) -> dict[str, Any]:
    """Return the row of an error; too little memory and missing support for a feature are no failed checks."""
    is_expected = isinstance(error, torch.OutOfMemoryError | InputError)
    return {"note": summarize_error(error)} | ({} if is_expected else {"passed": False})


def release_memory() -> None:
    """Release compiled code and the memory of objects that are no longer used."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def timed_model(recipe: Recipe, device: torch.device, float8_scaling: Float8Scaling = "rowwise") -> TimedModel:
    """Return a model for one GPU, whose weights are drawn on the device because the CPU needs seconds for this."""
    with patch.object(plan_measure, "initialize", lambda model, _: fill_weights(model)):
        return TimedModel(recipe, LLAMA_2_VOCAB_SIZE, 1, device, float8_scaling)


@torch.no_grad()
def fill_weights(model: Llama) -> None:
    """Set the weights of norms to one, and draw the others on the device."""
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.fill_(1.0) if parameter.ndim == 1 else local.normal_(std=0.02)


def time_step(timed: TimedModel) -> tuple[float, float]:
    """Return the median seconds of a micro-batch between the first and the last one, and of the rest of a step.

    The rest is the update and the additional time of the first and the last micro-batch, in which FSDP communicates if
    the step keeps its weights. The step's time is the number of micro-batches times the first value, plus the second.
    """
    rounds = [
        (timed.micro_batch(False), timed.micro_batch(False), timed.micro_batch(), timed.update())
        for _ in range(num_rounds(timed.ids.device))
    ]
    first, middle, last, update = (statistics.median(column) for column in zip(*rounds, strict=True))
    return middle, update + first + last - 2 * middle


def num_rounds(device: torch.device) -> int:
    """Return how often times are measured; a dry run does not need medians."""
    return ROUNDS if device.type == "cuda" else 1


def select_float8_matrices(stack: ExitStack) -> None:
    """Convert only the matrices to float8 that torchao's filter for one scale per row selects."""
    silence_torchao()
    import torchao.float8 as float8  # noqa: PLC0415, PLR0402

    convert = partial(
        float8.convert_to_float8_training, module_filter_fn=float8._auto_filter_for_recipe("rowwise", filter_fqns=[])
    )
    stack.enter_context(patch.object(float8, "convert_to_float8_training", convert))


def shard_on_one_rank(stack: ExitStack, device: torch.device) -> None:
    """Make models that are built until the stack closes be sharded by FSDP2 over a mesh of one rank."""
    stack.enter_context(one_rank_group(device.type))
    mesh = dist.init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
    stack.enter_context(patch.object(setup, "build_mesh", lambda *_: mesh))
    stack.enter_context(patch.object(plan_measure, "World", lambda rank, size, device: World(rank, 2, device)))


def count_synchronisations(call: Callable[[], object]) -> int:
    """Return how many operations of a call wait for the GPU, except `torch.cuda.synchronize`; 0 on a CPU."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        if has_gpu:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def profile(device: str) -> Iterator[dict[str, Any]]:
    """Yield the time of each group of kernels in one micro-batch and one optimizer step of the 1.1B model."""
    where = torch.device(device)
    llama.linear_cross_entropy = record_function("loss")(llama.linear_cross_entropy)
    timed = timed_model(load_recipe("tinyllama-1.1b", device, {}), where)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    for name, call in (("micro-batch", timed.micro_batch), ("optimizer step", timed.update)):
        call()
        timed.micro_batch()  # an update removes the gradients
        with torch_profile(activities=activities) as profiler:
            call()
        times = group_times(profiler.events(), device)
        total = sum(times.values())
        for group, milliseconds in times.items():
            yield {"of": name, "kernels": group, "ms": milliseconds, "%": 100 * milliseconds / total if total else None}


def group_times(events: Iterable[Any], device: str) -> dict[str, float]:
    """Return the milliseconds of each group of kernels; on a CPU, those of each group of operations."""
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    events = [event for event in events if event.device_type == kind]
    # On a GPU, an annotation's event covers the kernels that the annotated code started.
    loss_times = [event.time_range for event in events if event.name == "loss" and event.is_user_annotation]
    times = dict.fromkeys([*GROUPS, "loss", "other"], 0.0)
    for event in events:
        if device == "cuda" and event.is_user_annotation:
            continue
        is_loss = any(span.start <= event.time_range.start < span.end for span in loss_times)
        microseconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        times["loss" if is_loss else kernel_group(event.name)] += microseconds / 1e3
    return times


def kernel_group(name: str) -> str:
    """Return the group of a kernel by its name."""
    lower = name.lower()
    return next((group for group, parts in GROUPS.items() if any(part in lower for part in parts)), "other")


def inference(device: str) -> Iterator[dict[str, Any]]:
    """Yield the speed of scoring texts of several lengths and of generation, with each choice of attention kernels."""
    recipe = load_recipe("tinyllama-1.1b", device, {})
    with torch.device("meta"):
        model = Llama(recipe.model, LLAMA_2_VOCAB_SIZE, torch.bfloat16)
    fill_weights(model.to_empty(device=device))
    length = recipe.model.context_length
    lengths = [min(count, length) for count in _TEXT_LENGTHS]
    texts = [torch.randint(LLAMA_2_VOCAB_SIZE, (8, count), device=device) for count in lengths]
    tokens, prompt, new = sum(ids.numel() for ids in texts), texts[0][0, : length // 4].tolist(), 16
    with_cudnn = [SDPBackend.CUDNN_ATTENTION, *INFERENCE_KERNELS]
    # The first pass is not reported, since it loads kernels and allocates memory for each shape.
    for name, kernels in (("", INFERENCE_KERNELS), ("without cuDNN", INFERENCE_KERNELS), ("with cuDNN", with_cudnn)):
        with (
            sdpa_kernel(kernels, set_priority=True),
            patch.object(generation, "INFERENCE_KERNELS", kernels),
            torch.no_grad(),
        ):
            scoring = time_call(lambda: [model(ids) for ids in texts])
            generating = time_call(lambda: list(generation.generate(model, prompt, new)))
        if name:
            yield {"kernels": name, "scored tokens/s": tokens / scoring, "generated tokens/s": new / generating}
