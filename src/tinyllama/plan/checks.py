"""What was found on a machine, judged: a row for each thing, with its mark and its remedy. Pure.

`ok` is as it should be, `warning` works but less or later, `missing` stops something. Of a machine alone only what the
package itself cannot do without is `missing`: what a recipe needs of the rest, `needs` says.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tinyllama.formatting import format_bytes
from tinyllama.plan.system_info import Device, SystemInfo

Status = Literal["ok", "warning", "missing"]

FEW_OPEN_FILES = 1024
"""A shard of the store has two files, and a store of many sources has hundreds of them."""
_LITTLE_SHARED_MEMORY = 1 << 30
"""NCCL takes some tens of MB a GPU; a container has 64 MB unless it is told otherwise."""
_USES = {
    "clean": "for data.sources.*.clean",
    "evaluate": "for scores",
    "float8": "for train.float8",
    "formats": "for GGUF and CTranslate2, and to verify releases",
    "offline": "for the evaluation tasks' items without the hub",
    "ray": "for data.executor: ray",
    "track": "for track.wandb and track.tensorboard",
}


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at."""

    part: str
    """The table that it stands in."""
    what: str
    found: str
    mark: Status = "ok"
    remedy: str = ""


def machine_rows(found: SystemInfo) -> list[CheckResult]:
    """All that is said of a machine without a recipe."""
    return [*_software(found), *_devices(found), *_system(found), *_extras(found)]


def _software(found: SystemInfo) -> Iterator[CheckResult]:
    part = "software"
    yield CheckResult(part, "Python", f"{found.python}, {found.system}")
    unmet = found.required.get("", ())
    words = f"{found.version}: {', '.join(unmet)}" if unmet else found.version
    yield CheckResult(part, "tinyllama", words, "missing" if unmet else "ok", "pip install tinyllama" if unmet else "")
    built = f"CUDA {found.cuda}" if found.cuda else "CPUs alone"
    yield CheckResult(part, "torch", f"{found.torch}, built for {built}")
    if found.can_compile:
        yield CheckResult(part, "torch.compile", "a C++ compiler and Python's headers")
    else:
        remedy = "install g++ and Python's headers (Debian: g++ python3-dev)"
        yield CheckResult(part, "torch.compile", "no C++ compiler, or no Python.h", "warning", remedy)
    yield CheckResult(part, "distributed", ", ".join(found.back_ends) or "none")


def _devices(found: SystemInfo) -> Iterator[CheckResult]:
    part = "devices"
    for number, device in enumerate(found.devices):
        yield _device(f"GPU {number}", device)
    if not found.devices:
        yield _no_gpu(found)
    own = "torch's " if found.devices else "this package's own; torch's "
    yield CheckResult(part, "attention", own + (", ".join(found.attention) or "none"))
    if len(found.devices) > 1 and "nccl" not in found.back_ends:
        yield CheckResult(part, "GPUs together", "torch has no NCCL", "missing", "install torch's CUDA build")


def _device(what: str, device: Device) -> CheckResult:
    major, minor = device.capability
    knows = ", ".join(name for name, has in (("bf16", device.bf16), ("float8", device.float8)) if has)
    words = (
        f"{device.name}, {format_bytes(device.memory_bytes)}, compute capability {major}.{minor}: {knows or 'no bf16'}"
    )
    if device.bf16:
        return CheckResult("devices", what, words)
    return CheckResult("devices", what, words, "warning", "train with --train.precision fp32")


def _no_gpu(found: SystemInfo) -> CheckResult:
    if not found.has_nvidia_driver:
        return CheckResult("devices", "GPU", "none; training runs on the CPU")
    if found.cuda is None:
        return CheckResult(
            "devices", "GPU", "a driver, but torch is built for CPUs alone", "warning", "install torch's CUDA build"
        )
    remedy = f"install a driver for CUDA {found.cuda}; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return CheckResult("devices", "GPU", "a driver, but torch sees no GPU", "warning", remedy)


def _system(found: SystemInfo) -> Iterator[CheckResult]:
    part = "system"
    yield CheckResult(part, "CPU cores", str(found.cores))
    yield CheckResult(part, "memory", format_bytes(found.memory_bytes))
    if found.shared_memory_bytes is not None:
        few = len(found.devices) > 1 and found.shared_memory_bytes < _LITTLE_SHARED_MEMORY
        remedy = "start the container with --ipc=host or --shm-size=8g" if few else ""
        yield CheckResult(part, "/dev/shm", format_bytes(found.shared_memory_bytes), "warning" if few else "ok", remedy)
    few = 0 <= found.open_files < FEW_OPEN_FILES
    words = f"{found.open_files:,}" if found.open_files >= 0 else "any number"
    yield CheckResult(part, "open files", words, "warning" if few else "ok", "ulimit -n 65536" if few else "")


def _extras(found: SystemInfo) -> Iterator[CheckResult]:
    for extra in sorted(found.required.keys() - {""}):
        unmet = found.required[extra]
        remedy = f'pip install "tinyllama[{extra}]", {_USES[extra]}' if unmet else ""
        yield CheckResult("extras", extra, ", ".join(unmet) or "installed", "warning" if unmet else "ok", remedy)
    here = ", ".join(found.offline_tasks)
    yield CheckResult("extras", "items without the hub", here or "of no task", "ok")
