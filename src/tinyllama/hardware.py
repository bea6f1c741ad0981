"""Hardware: cores, memory, peak FLOP/s, the allocator, and a table of hardware specs for known GPUs.

Rows of the table come from the manufacturers' data sheets. The peaks are for dense matrix products, with torch's
default settings: bf16 or fp16 with float32 accumulation, and float32 without TF32. A CPU's hardware spec is measured.
Planning uses the table without torch, so each function that needs torch imports it.
"""

import ctypes
import os
import platform
import re
import resource
import shutil
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.errors import InputError

if TYPE_CHECKING:
    import torch

# ruff: noqa: PLC0415


@dataclass(frozen=True)
class HardwareSpec:
    """Hardware spec of one GPU model, or of this machine's CPU."""

    name: str
    bf16_flops: float
    """Peak FLOP/s of dense bf16 matrix products, and on a GPU also of fp16 products."""
    fp32_flops: float
    """Peak FLOP/s of dense float32 matrix products."""
    memory_bytes: float
    """Nominal memory in bytes; data sheets use units of 10^9 bytes."""
    link_bytes_per_second: float
    """Bandwidth in one direction to the other GPUs of the node: NVLink, or PCIe x16."""
    network_bytes_per_second: float
    """Bandwidth in one direction from a node of eight GPUs to other nodes: a DGX's network, or a 100 Gbit/s port."""
    source: str
    """Source of these numbers."""
    assumed_mfu: float = 0.5
    """MFU that `plan` assumes for the 1.1B model without a measurement: an estimate."""
    capability: tuple[int, int] = (8, 0)
    """CUDA compute capability; (8, 0) for all GPUs with bf16."""
    is_cpu: bool = False

    def peak_flops(self, precision: str) -> float:
        """Return the peak FLOP/s for computing in `bf16`, `fp16` or `fp32`."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops

    def per_process(self, processes: int) -> "HardwareSpec":
        """Return the hardware spec for one of `processes` processes: an equal part of the CPU, or one GPU."""
        if not self.is_cpu:
            return self
        parts = {name: getattr(self, name) / processes for name in ("bf16_flops", "fp32_flops", "memory_bytes")}
        return replace(self, **parts)


_PCIE_3, _PCIE, _PCIE_5, _NIC_100_GBIT = 16e9, 32e9, 64e9, 12.5e9
_A100 = "NVIDIA A100 Tensor Core GPU data sheet (SXM); DGX A100 data sheet: 8 x 200 Gbit/s"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet (SXM5); DGX H100 data sheet: 8 x 400 Gbit/s"
_H100_PCIE = "NVIDIA H100 Tensor Core GPU data sheet (PCIe); without an NVLink bridge"
_H100_NVL = "NVIDIA H100 Tensor Core GPU data sheet (NVL); without an NVLink bridge"
_H200_NVL = "NVIDIA H200 Tensor Core GPU data sheet (NVL); without an NVLink bridge"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet (SXM); DGX H200 data sheet: 8 x 400 Gbit/s"
_B200 = "NVIDIA HGX B200 and DGX B200 data sheets, of 8 GPUs: 1,440 GB, 36 PFLOP/s sparse bf16, 8 x 400 Gbit/s"
# Without peer-to-peer, GPU-to-GPU traffic passes through the host's memory and may reach only half of PCIe's bandwidth.
_ADA = "NVIDIA Ada GPU Architecture white paper, appendix A; PCIe without peer-to-peer"
_AMPERE = "NVIDIA Ampere GA102 GPU Architecture white paper, table 9; PCIe without peer-to-peer"
_V100 = "NVIDIA V100 Tensor Core GPU data sheet (SXM2), fp16; DGX-1 data sheet: 4 x 100 Gbit/s"
_V100_PCIE = "NVIDIA V100 Tensor Core GPU data sheet (PCIe), fp16"
_T4 = "NVIDIA T4 Tensor Core GPU data sheet, fp16"

TENSOR_CORE_CAPABILITY = (7, 0)
"""Lowest CUDA compute capability with fast fp16 matrix products, and the lowest that Triton supports (Volta)."""
BF16_CAPABILITY = (8, 0)
"""Lowest CUDA compute capability with bf16 matrix products (Ampere). On older GPUs, torch emulates bf16 slowly."""
FLOAT8_CAPABILITY = (8, 9)
"""Lowest CUDA compute capability with float8 matrix products (Ada)."""
FP16_ON_CPU_WARNING = "train.precision: on most CPUs, fp16 is very slow; use bf16 or fp32"
HARDWARE_SPECS = {
    spec.name: spec
    for spec in (
        HardwareSpec("a100-40g", 312e12, 19.5e12, 40e9, 300e9, 200e9, _A100),
        HardwareSpec("a100-80g", 312e12, 19.5e12, 80e9, 300e9, 200e9, _A100),
        HardwareSpec("h100", 989e12, 67e12, 80e9, 450e9, 400e9, _H100, 0.43),
        HardwareSpec("h100-pcie", 756e12, 51e12, 80e9, _PCIE_5, _NIC_100_GBIT, _H100_PCIE, 0.43),
        HardwareSpec("h100-nvl", 835e12, 60e12, 94e9, _PCIE_5, _NIC_100_GBIT, _H100_NVL, 0.43),
        HardwareSpec("h200", 989e12, 67e12, 141e9, 450e9, 400e9, _H200, 0.45),
        HardwareSpec("h200-nvl", 836e12, 60e12, 141e9, _PCIE_5, _NIC_100_GBIT, _H200_NVL, 0.45),
        HardwareSpec("b200", 2250e12, 75e12, 180e9, 900e9, 400e9, _B200, 0.35),
        HardwareSpec("l40s", 362e12, 91.6e12, 48e9, _PCIE, _NIC_100_GBIT, "NVIDIA L40S data sheet"),
        HardwareSpec("4090", 165e12, 82.6e12, 24e9, _PCIE, _NIC_100_GBIT, _ADA),
        HardwareSpec("3090", 71e12, 35.6e12, 24e9, _PCIE, _NIC_100_GBIT, _AMPERE),
        # On one V100, Megatron-LM reached 30 % (Shoeybi et al. 2019, arXiv:1909.08053, section 5).
        HardwareSpec("v100-16g", 125e12, 15.7e12, 16e9, 150e9, 50e9, _V100, 0.3, (7, 0)),
        HardwareSpec("v100-32g", 125e12, 15.7e12, 32e9, 150e9, 50e9, _V100, 0.3, (7, 0)),
        HardwareSpec("v100-pcie-16g", 112e12, 14e12, 16e9, _PCIE_3, _NIC_100_GBIT, _V100_PCIE, 0.3, (7, 0)),
        HardwareSpec("v100-pcie-32g", 112e12, 14e12, 32e9, _PCIE_3, _NIC_100_GBIT, _V100_PCIE, 0.3, (7, 0)),
        HardwareSpec("t4", 65e12, 8.1e12, 16e9, _PCIE_3, _NIC_100_GBIT, _T4, 0.25, (7, 5)),
    )
}
GPUS_PER_NODE = 8


def get_hardware_spec(name: str) -> HardwareSpec:
    """Return the table's hardware spec with this name; for `cpu`, measure this machine's CPU.

    Raises InputError for an unknown name.
    """
    if name == "cpu":
        return measure_cpu_spec()
    if name not in HARDWARE_SPECS:
        raise InputError(
            f"--hardware {name}: unknown; name one of {', '.join(HARDWARE_SPECS)}, or cpu for this machine's CPU"
        )
    return HARDWARE_SPECS[name]


def spec_for_device(device_name: str) -> HardwareSpec | None:
    """Return the hardware spec for a driver's GPU name, such as `NVIDIA A100-SXM4-80GB`; None if the table has none.

    A MIG instance, which is a part of a GPU, has no spec.
    """
    lower = device_name.lower()
    if re.search(r"\bmig\b", lower):
        return None
    if "a100" in lower:
        return HARDWARE_SPECS["a100-40g" if "40gb" in lower else "a100-80g"]
    # A letter before a part, or a digit or an `s` after it, would belong to the name of another GPU, such as the GH200,
    # the T400 and the V100S.
    variants = (
        spec
        for name, spec in HARDWARE_SPECS.items()
        if all(re.search(rf"(?<![a-z]){part}(?![\ds])", lower) for part in name.split("-"))
    )
    return max(variants, key=lambda spec: len(spec.name), default=None)


def measure_cpu_spec() -> HardwareSpec:
    """Measure the CPU's matrix-product throughput in about one second; return its hardware spec."""
    import torch

    bf16, fp32 = benchmark_matmul_flops(torch.bfloat16), benchmark_matmul_flops(torch.float32)
    source = "products of 2048 x 2048 matrices, measured now"
    return HardwareSpec("cpu", bf16, fp32, total_memory_bytes(), 10e9, 12.5e9, source, is_cpu=True)


def native_precision(capability: tuple[int, int]) -> str:
    """Return the fastest precision that a GPU of this compute capability supports natively: bf16, fp16 or fp32."""
    if capability >= BF16_CAPABILITY:
        return "bf16"
    return "fp16" if capability >= TENSOR_CORE_CAPABILITY else "fp32"


def check_bf16(precision: str, optimizer: str, gpu: str, capability: tuple[int, int]) -> None:
    """Check that a GPU supports bf16 if training needs it. Raises InputError otherwise.

    `gpu` is the name of the GPU, and `optimizer` the value of `train.optimizer.name`.
    """
    if (native := native_precision(capability)) == "bf16":
        return
    if precision == "bf16":
        remedy = "--train.precision fp16 (or fp32)" if native == "fp16" else "--train.precision fp32"
        raise InputError(f"train.precision: {gpu} does not support bf16, and torch emulates it slowly; use {remedy}")
    if optimizer == "muon" and precision == "fp16":
        problem = f"muon with fp16 computes in bf16, which {gpu} does not support and torch emulates slowly"
        raise InputError(f"train.optimizer.name: {problem}; use --train.optimizer.name adamw or --train.precision fp32")


def inference_precision(device: "torch.device", precision: "torch.dtype") -> "torch.dtype":
    """Return the dtype in which to evaluate a model, so that the device does not emulate the dtype `precision`.

    On a GPU without bf16, float16 (float32 before Volta) replaces bf16. On a CPU, float32 replaces float16.
    """
    import torch

    if device.type == "cpu":
        return torch.float32 if precision == torch.float16 else precision
    native = native_precision(torch.cuda.get_device_capability(device))
    if precision == torch.bfloat16 and native != "bf16":
        return torch.float16 if native == "fp16" else torch.float32
    return precision


def peak_flops(device: "torch.device", precision: "torch.dtype") -> float | None:
    """Return the peak FLOP/s for MFU: the table's value for a GPU, or a measured value for a CPU.

    The result is None for an unknown GPU, and for fp16 on a CPU, where a single measurement could take a minute.
    """
    import torch

    if device.type == "cpu":
        return None if precision == torch.float16 else benchmark_matmul_flops(precision)
    spec = spec_for_device(torch.cuda.get_device_name(device))
    return spec.peak_flops("fp32" if precision == torch.float32 else "bf16") if spec else None


def benchmark_matmul_flops(precision: "torch.dtype") -> float:
    """Measure the FLOP/s of square matrix products on the CPU and return the highest value.

    The benchmark computes at least three matrix products and runs for at least half a second. It stops early after one
    second, since a CPU without bf16 instructions needs many seconds for one product.
    """
    import torch

    size = 2048
    left, right = torch.ones(2, size, size, dtype=precision)
    seconds: list[float] = []
    while sum(seconds) < (1.0 if len(seconds) < 3 else 0.5):
        begun = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def device_name(device: "torch.device") -> str:
    """Return a GPU's name, or the CPU's model."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def hardware_record(device: "torch.device", ranks: int) -> dict[str, Any]:
    """Return a JSON description of the hardware of `ranks` processes, each on a device like `device`."""
    import torch

    record = {"device": device_name(device), "type": device.type, "ranks": ranks}
    if device.type == "cpu":
        record |= {"cores": available_cpu_count(), "threads": torch.get_num_threads()}
    return record


def format_hardware(record: Mapping[str, Any]) -> str:
    """Format a hardware record as one line, including `precision` and `peak_flops` per rank (None if unknown)."""
    ranks, is_cpu = record["ranks"], record["type"] == "cpu"
    if is_cpu:
        cores, threads = (
            f"{record[name]} {name.removesuffix('s' * (record[name] == 1))}" for name in ("cores", "threads")
        )
        what = f"{record['device']}, {cores}, " + (f"{ranks} ranks with {threads} each" if ranks > 1 else threads)
    else:
        what = f"{ranks} x {record['device']}"
    if record["peak_flops"] is None:
        return f"{what}; {record['precision']} peak not known"
    source = f"per {'rank' if is_cpu else 'GPU'}, {'measured' if is_cpu else 'from its data sheet'}"
    return f"{what}; {record['precision']} peak {record['peak_flops'] / 1e12:.3g} TFLOP/s {source}"


def nvidia_devices() -> list[Path]:
    """Return the device files of this machine's or container's NVIDIA GPUs; WSL 2 has one file for all GPUs."""
    files = sorted(Path("/dev").glob("nvidia[0-9]*"))
    wsl, driver = Path("/dev/dxg"), Path("/usr/lib/wsl/lib/libcuda.so.1")  # other makers' GPUs also have /dev/dxg
    return [*files, wsl] if wsl.exists() and driver.exists() else files


def can_compile(device: "torch.device") -> bool:
    """Return whether torch.compile can run on a device.

    Inductor compiles C++ for a CPU, and Triton compiles C for a GPU, Volta or newer. Both need Python's headers.
    """
    import torch

    if device.type == "cuda" and torch.cuda.get_device_capability(device) < TENSOR_CORE_CAPABILITY:
        return False
    choices = ("CXX", "c++", "g++", "clang++") if device.type == "cpu" else ("CC", "gcc", "clang", "cc")
    compilers = filter(None, (os.environ.get(choices[0]), *choices[1:]))
    return any(map(shutil.which, compilers)) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def tune_malloc() -> None:
    """Make glibc keep freed memory for reuse in the next step; other C libraries are not affected.

    By default, glibc returns the memory of large tensors to the operating system. This causes 800,000 page faults per
    step, which take up to 20 % of the step's time on a CPU.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # The options are M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD in glibc's malloc.h.
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
        libc.mallopt(option, value)


def available_cpu_count() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def total_memory_bytes() -> int:
    """Return the memory of this machine in bytes, or the container's limit if that is lower."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(installed, int(text)) if text.isdigit() else installed


def device_memory_bytes(device: "torch.device", processes: int) -> int:
    """Return the memory of a GPU in bytes, or one process's part of this machine's memory if the device is a CPU.

    `processes` is the number of processes on this machine that train on the CPU.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return total_memory_bytes() // processes


def resident_memory_bytes() -> int:
    """Return the memory that this process uses at present, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes(device: "torch.device") -> int:
    """Return the peak memory use in bytes: GPU memory if the device is a GPU, otherwise memory of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
