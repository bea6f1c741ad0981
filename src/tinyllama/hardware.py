"""What this machine can do, and what makes it do it."""

import ctypes
import os
import platform
import re
import resource
import shutil
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tinyllama.plan.hardware_specs import spec_for_device
from tinyllama.processes import available_cpu_count


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """FLOP/s against which an MFU is stated: the data sheet's on a known GPU, measured on a CPU, None elsewhere."""
    if device.type == "cpu":
        return benchmark_matmul_flops(precision)
    machine = spec_for_device(torch.cuda.get_device_name(device))
    return machine.peak_flops("bf16" if precision == torch.bfloat16 else "fp32") if machine else None


def benchmark_matmul_flops(precision: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a square matrix product on the CPU: what a perfect model would run at.

    The best of half a second, of three at least, or of fewer once a second is over: a CPU without instructions for bf16
    takes many seconds for one.
    """
    left, right = torch.ones(2, size, size, dtype=precision)
    seconds: list[float] = []
    while sum(seconds) < (1.0 if len(seconds) < 3 else 0.5):
        begun = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def device_name(device: torch.device) -> str:
    """Return a GPU's name or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpus.read_text(), re.MULTILINE) if cpus.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def describe(device: torch.device, ranks: int) -> dict[str, Any]:
    """Describe what `ranks` processes compute on, each on a device like this one, as JSON: see `describe_hardware`."""
    found = {"device": device_name(device), "type": device.type, "ranks": ranks}
    if device.type == "cpu":
        found |= {"cores": available_cpu_count(), "threads": torch.get_num_threads()}
    return found


def describe_hardware(entry: Mapping[str, Any]) -> str:
    """Return what `describe` found, and the peak of each rank where the entry has one, as one line."""
    ranks, on_cpu = entry["ranks"], entry["type"] == "cpu"
    if on_cpu:
        cores, threads = (
            f"{entry[name]} {name.removesuffix('s' * (entry[name] == 1))}" for name in ("cores", "threads")
        )
        words = f"{entry['device']}, {cores}, " + (f"{ranks} ranks with {threads} each" if ranks > 1 else threads)
    else:
        words = f"{ranks} x {entry['device']}"
    if entry["peak_flops"] is None:
        return f"{words}; {entry['precision']} peak not known"
    source = f"per {'rank' if on_cpu else 'GPU'}, {'measured' if on_cpu else 'from its data sheet'}"
    return f"{words}; {entry['precision']} peak {entry['peak_flops'] / 1e12:.3g} TFLOP/s {source}"


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: on a CPU, a C++ compiler and Python's headers."""
    if device.type != "cpu":
        return True
    compilers = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))
    return any(map(shutil.which, compilers)) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def tune_malloc() -> None:
    """Tell glibc to keep freed memory instead of giving it back and faulting it in again every step.

    Big tensors otherwise cost 800,000 page faults a step and up to a fifth of the time on a CPU. Elsewhere a no-op.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # Names and numbers are glibc's malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD.
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
        libc.mallopt(option, value)


def total_memory_bytes() -> int:
    """Memory of this machine, or of the container if that has less."""
    own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text().strip() if limit.is_file() else ""
    return min(own, int(words)) if words.isdigit() else own


def memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
