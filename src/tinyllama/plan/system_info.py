"""Facts about this machine, collected once in a frozen record for the checks of `doctor`.

`probe` reads the system, torch and the metadata of installed packages, and writes nothing. The checks are pure
functions of the record, so tests can check hypothetical machines.
"""

import platform
import resource
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyllama import hardware
from tinyllama.evaluate.items import OFFLINE_TASKS, available_offline
from tinyllama.hardware import FLOAT8_CAPABILITY, available_cpu_count

_DEVELOPER_EXTRAS = ("all", "dev")
_ATTENTION_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Device:
    """A GPU as reported by torch."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """CUDA compute capability, such as (9, 0)."""

    @property
    def precision(self) -> str:
        """Fastest native precision: bf16, fp16 or fp32. torch's own check of bf16 also accepts emulation."""
        return hardware.native_precision(self.capability)

    @property
    def float8(self) -> bool:
        """Whether the GPU supports float8 matrix products (Ada, Hopper and later)."""
        return self.capability >= FLOAT8_CAPABILITY


@dataclass(frozen=True)
class SystemInfo:
    """Facts about a machine."""

    python: str
    system: str
    version: str
    """Version of tinyllama."""
    torch: str
    cuda: str | None
    """CUDA version of the torch build; None for a CPU build."""
    cores: int
    """Number of CPU cores that this process may use."""
    memory_bytes: int
    """Memory in bytes of the machine, or of the container if the container has less."""
    shared_memory_bytes: int | None
    """Size of /dev/shm in bytes; None if /dev/shm does not exist."""
    open_files: int
    """Limit of open files per process; -1 for no limit."""
    can_compile: bool
    """Whether torch.compile can run on the GPU, or on the CPU of a machine without a GPU."""
    has_nvidia_gpu: bool
    """Whether the machine or container has an NVIDIA GPU, even if torch cannot use it."""
    devices: tuple[Device, ...] = ()
    attention: tuple[str, ...] = ()
    """torch's attention kernels that run on the first device."""
    backends: tuple[str, ...] = ()
    """Backends of torch.distributed."""
    unmet: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Unmet requirements of each extra, and of the package itself under `""`."""
    offline_tasks: tuple[str, ...] = ()
    """Evaluation tasks whose items are on this machine, apart from the hub's cache."""


def probe() -> SystemInfo:
    """Collect the facts about this machine."""
    shm = Path("/dev/shm")
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    properties = [torch.cuda.get_device_properties(number) for number in gpus]
    backends = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    return SystemInfo(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        version=version("tinyllama"),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cores=available_cpu_count(),
        memory_bytes=hardware.total_memory_bytes(),
        shared_memory_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        can_compile=hardware.can_compile(torch.device("cuda" if properties else "cpu")),
        has_nvidia_gpu=bool(hardware.nvidia_devices()),
        devices=tuple(Device(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)) for gpu in properties),
        attention=_working_attention_kernels(torch.device("cuda" if properties else "cpu")),
        backends=tuple(name for name, is_available in backends.items() if dist.is_available() and is_available()),
        unmet=unmet_requirements("tinyllama"),
        offline_tasks=tuple(filter(available_offline, OFFLINE_TASKS)),
    )


def _working_attention_kernels(device: torch.device) -> tuple[str, ...]:
    """Return the names of the attention kernels that run a small causal attention without an error."""
    precision, working = hardware.inference_precision(device, torch.bfloat16), []
    for name, kernel in _ATTENTION_KERNELS.items():
        try:
            # On a GPU that is older than torch's kernels, the next line also raises RuntimeError.
            query = torch.ones(1, 4, 128, 64, dtype=precision, device=device)
            with sdpa_kernel(kernel):
                F.scaled_dot_product_attention(query, query, query, is_causal=True)
        except RuntimeError:
            continue
        working.append(name)
    return tuple(working)


def unmet_requirements(package: str) -> dict[str, tuple[str, ...]]:
    """Return descriptions of an installed package's unmet requirements, such as `torch is 2.1, not ~=2.13`.

    The keys are the names of the package's extras. The key `""` has the requirements that belong to no extra.
    """
    extras = [extra for extra in metadata(package).get_all("Provides-Extra") or () if extra not in _DEVELOPER_EXTRAS]
    unmet = defaultdict[str, list[str]](list)
    for requirement in map(Requirement, requires(package) or ()):
        marker = requirement.marker
        needed_by = [""] if marker is None or marker.evaluate({"extra": ""}) else []
        if marker and not needed_by:
            needed_by = [extra for extra in extras if marker.evaluate({"extra": extra})]
        if problem := _unmet(requirement):
            for extra in needed_by:
                unmet[extra].append(problem)
    return {extra: tuple(unmet[extra]) for extra in ("", *sorted(extras))}


def _unmet(requirement: Requirement) -> str | None:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(installed, prereleases=True):
        return None
    return f"{requirement.name} is {installed}, not {requirement.specifier}"
