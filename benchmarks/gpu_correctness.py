"""Checks of benchmarks/gpu.py that need no training run: versions, attention kernels, sharding.

The reference is the same model on the CPU, with weights, matrix products and attention in float64. An error is the norm
of the difference divided by the norm of the reference. The tolerances are 3 % for bf16, which has 8 bits of precision,
0.5 % for fp16, which has 11 bits, and 1e-4 for float32. A dry run skips fp16, because its products take minutes on most
CPUs. The reference shares the model's code, whose norms, rotary embedding and loss compute in float32. The test suite
compares this code with transformers.
"""

import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyllama import hardware
from tinyllama.distributed import World, begin_micro_batch, build_mesh, shard_model
from tinyllama.errors import first_line, summarize_error
from tinyllama.model.llama import PRECISIONS, Llama, initialize
from tinyllama.recipe import Model, Optimizer, Parallel
from tinyllama.train.setup import build_optimizers, clip_grad_norm, optimizer_step

SHAPE = Model(dim=256, layers=4, heads=4, kv_heads=2, ffn_dim=704, context_length=512)
VOCABULARY = 4096
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MASKED = "flex_attention, document mask"
PRODUCT_SIZE = 8192


def environment(device: str) -> Iterator[dict[str, Any]]:
    """Yield versions, the device and the measured matrix products."""
    yield {"what": "Python", "found": platform.python_version()}
    yield {"what": "torch", "found": f"{torch.__version__}, CUDA {torch.version.cuda}"}
    for name in ("tinyllama", "numpy", "triton", "torchao", "transformers", "liger-kernel", "torchtitan"):
        yield {"what": name, "found": package_version(name)}
    yield {"what": "C compiler", "found": compiler_version()}
    on_gpu = device == "cuda"
    where = torch.device(device)
    yield {"what": "device", "found": hardware.device_name(where)}
    yield {"what": "torch.compile", "found": "compiler and headers found", "passed": hardware.can_compile(where)}
    if on_gpu:
        query = [
            shutil.which("nvidia-smi") or "false",
            "--query-gpu=driver_version,memory.total,power.limit",
            "--format=csv,noheader",
        ]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "no nvidia-smi"
        yield {"what": "driver, memory, power limit", "found": driver}
        yield {"what": "cuDNN", "found": torch.backends.cudnn.version()}
        yield {"what": "NCCL", "found": ".".join(map(str, torch.cuda.nccl.version()))}
        torch.zeros(1, device=device)
        settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
        found = settings.get("expandable_segments")
        yield {"what": "expandable segments", "found": str(found), "passed": bool(found)}
        yield {"what": "capability", "found": ".".join(map(str, torch.cuda.get_device_capability()))}
        yield {"what": "bf16", "found": "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"}
    yield from products(where)


def package_version(name: str) -> str:
    """Return a package's version, or `not installed`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def compiler_version() -> str:
    """Return the first line of the C compiler's version, or `none`."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    command = [compiler or "false", "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0] or "none"


def products(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the measured FLOP/s of square matrix products and the data sheet's value."""
    spec = hardware.spec_for_device(hardware.device_name(device)) if device.type == "cuda" else None
    for name in ("bf16", "fp16", "fp32") if device.type == "cuda" else ("bf16", "fp32"):
        flops = product_flops(device, PRECISIONS[name]) / 1e12
        sheet = spec.peak_flops(name) / 1e12 if spec else None
        found = f"{flops:.4g} TFLOP/s" + (f" of {sheet:.4g} ({100 * flops / sheet:.0f} %)" if sheet else "")
        yield {"what": f"{name} matrix product", "found": found}


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the highest FLOP/s of a few matrix products, of size 8192 on a GPU."""
    if device.type == "cpu":
        return hardware.benchmark_matmul_flops(dtype)
    left, right = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(4):
            left @ right
        end.record()
        torch.cuda.synchronize()
        best = max(best, 4 * 2 * PRODUCT_SIZE**3 / (begin.elapsed_time(end) / 1e3))
    return best


@dataclass
class Outcome:
    """Logits, loss and gradients of a model on a batch, in float64 on the CPU."""

    logits: Tensor
    loss: float
    gradients: Tensor


def attention(device: str) -> Iterator[dict[str, Any]]:
    """Yield the errors of logits, loss and gradients for each precision, kernel and mode, and equal weights.

    The last variant has a document mask.
    """
    length = SHAPE.context_length if device == "cuda" else 64
    ids = torch.randint(VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(1))
    reference = compute(small_model("cpu", torch.float64), ids)
    ours, theirs = small_model(device, torch.float32).state_dict(), small_model("cpu", torch.float32).state_dict()
    equal = all(torch.equal(ours[name].cpu(), theirs[name]) for name in theirs)
    yield {"precision": "fp32", "kernel": "none", "check": "initial weights equal the CPU's", "passed": equal}
    for precision, tolerance in TOLERANCES.items():
        if precision == torch.float16 and device == "cpu":
            yield {"precision": "float16", "kernel": "all", "check": "skipped on a CPU"}
            continue
        variants = [(name, "none", [kernel]) for name, kernel in BACKENDS.items()]
        variants += [(f"any, checkpointing {mode}", mode, list(BACKENDS.values())) for mode in ("selective", "full")]
        variants += [(MASKED, "none", list(BACKENDS.values()))]
        for name, mode, kernels in variants:
            row = {"precision": str(precision).removeprefix("torch."), "kernel": name}
            model = small_model(device, precision)
            model.set_activation_checkpointing(mode)
            try:
                with sdpa_kernel(kernels):
                    if name == MASKED:
                        starts = document_starts(ids[:, 1:])
                        masked = compute(small_model("cpu", torch.float64), ids, starts)
                        yield row | compare(compute(model, ids, starts), masked, tolerance)
                    else:
                        yield row | compare(compute(model, ids), reference, tolerance)
            except Exception as error:  # an error of one kernel must not end the others
                if "No available kernel" in str(error) and not is_required(name, precision, device):
                    yield row | {"check": f"not available: {first_line(error)}"}
                else:
                    yield row | {"check": summarize_error(error), "passed": False}


def document_starts(ids: Tensor) -> Tensor:
    """Return the document mask of sequences in which a document begins at about every 40th token."""
    begins = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 1 / 40
    return torch.where(begins, torch.arange(ids.shape[1]), 0).cummax(1).values.int()


def is_required(kernel: str, precision: torch.dtype, device: str) -> bool:
    """Return whether every GPU must run this kernel with grouped heads; flash attention needs Ampere or newer."""
    if kernel == "flash":
        is_old = device == "cuda" and torch.cuda.get_device_capability() < hardware.BF16_CAPABILITY
        return precision != torch.float32 and not is_old
    if kernel == "efficient":
        return precision != torch.bfloat16  # in bf16, the heads' keys and values are not copied (model/attention.py)
    return kernel != "cuDNN"


def compare(outcome: Outcome, reference: Outcome, tolerance: float) -> dict[str, Any]:
    """Return the relative errors of an outcome, and whether all of them are below the tolerance."""
    errors = {
        "logits": relative_error(outcome.logits, reference.logits),
        "loss": abs(outcome.loss / reference.loss - 1),
        "gradients": relative_error(outcome.gradients, reference.gradients),
    }
    check = f"relative errors below {tolerance:g}"
    return {"check": check, **errors, "passed": largest(errors.values()) < tolerance}


def small_model(device: str, precision: torch.dtype) -> Llama:
    """Return a small model with the same weights on each device."""
    with torch.device("meta"):
        model = Llama(SHAPE, VOCABULARY, precision)
    model.to_empty(device=device)
    initialize(model, 1)
    return model.double() if precision == torch.float64 else model


def compute(model: Llama, ids: Tensor, document_starts: Tensor | None = None) -> Outcome:
    """Compute the outcome of a model on ids int64[B, T + 1]."""
    ids = ids.to(model.device)
    starts = None if document_starts is None else document_starts.to(model.device)
    with torch.no_grad():
        logits = model(ids[:, :-1], document_starts=starts)
    loss = model.loss(ids[:, :-1], ids[:, 1:], document_starts=starts)
    loss.backward()
    gradients = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])
    return Outcome(logits.double().cpu(), float(loss), gradients)


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference divided by the norm of the reference."""
    return float((found - reference).norm() / reference.norm())


def largest(errors: Iterable[float]) -> float:
    """Return the largest error, or NaN if any error is NaN, which `max` ignores unless it comes first."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def sharding(device: str) -> Iterator[dict[str, Any]]:
    """Yield the difference of weights after three steps between a sharded and an unsharded model.

    In the last case, a step has three micro-batches over which it keeps its weights, in bf16.
    """
    world = World(0, 1, torch.device(device))
    with one_rank_group(device):
        for tied in (False, True):
            for name in ("adamw", "muon"):
                expected = trained_weights(world, tied, name, None)
                for mesh in ("1 rank", "1 x 1 ranks (HSDP)"):
                    found = trained_weights(world, tied, name, mesh)
                    error = largest(relative_error(found[key], expected[key]) for key in expected)
                    limit = 3e-3 if name == "muon" else 1e-3  # the order of sums changes a bf16 update by up to 2 %
                    row = {"mesh": mesh, "optimizer": name, "head": "tied" if tied else "untied"}
                    yield row | {"largest error": error, "passed": error < limit}
        expected = trained_weights(world, False, "adamw", None, torch.bfloat16, 3)
        found = trained_weights(world, False, "adamw", "1 rank", torch.bfloat16, 3)
        error = largest(relative_error(found[key], expected[key]) for key in expected)
        row = {"mesh": "1 rank, weights kept, bf16", "optimizer": "adamw", "head": "untied"}
        yield row | {"largest error": error, "passed": error < 1e-2}


@contextmanager
def one_rank_group(device: str) -> Iterator[None]:
    """Create a process group of this process alone during the block: NCCL on a GPU, gloo on a CPU."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20))
    try:
        yield
    finally:
        dist.destroy_process_group()


def trained_weights(
    world: World,
    tied: bool,
    optimizer: str,
    mesh: str | None,
    precision: torch.dtype = torch.float32,
    micro_batches: int = 1,
) -> dict[str, Tensor]:
    """Return the weights after three steps on random batches, on the CPU; without a mesh, the model is not sharded.

    Steps of several micro-batches keep their weights. A forward pass without gradients follows each step, as in
    validation.
    """
    shape = SHAPE.model_copy(update={"tie_embeddings": tied, "layers": 2})
    with torch.device("meta"):
        model = Llama(shape, VOCABULARY, precision)
    keeps_weights = micro_batches > 1
    if mesh == "1 rank":
        shard_model(model, build_mesh(Parallel(), world), keeps_weights)
    elif mesh:
        names = ("replicate", "shard")
        shard_model(model, dist.init_device_mesh(world.device.type, (1, 1), mesh_dim_names=names))
    model.to_empty(device=world.device)
    initialize(model, 1)
    optimizers = build_optimizers(model, Optimizer(name=optimizer, learning_rate=1e-3))
    random = torch.Generator().manual_seed(2)
    for _ in range(3):
        for number in range(1, micro_batches + 1):
            ids = torch.randint(VOCABULARY, (2, 129), generator=random).to(world.device)
            begin_micro_batch(model, number == micro_batches, keeps_weights)
            (model.loss(ids[:, :-1], ids[:, 1:]) / (micro_batches * ids[:, 1:].numel())).backward()
        clip_grad_norm(model, 1.0)
        optimizer_step(optimizers, 1e-3)
        model.zero_grad()
        with torch.no_grad():
            model.loss(ids[:, :-1], ids[:, 1:])
    weights = {name: value.full_tensor() if mesh else value for name, value in model.state_dict().items()}
    return {name: value.detach().double().cpu() for name, value in weights.items()}
