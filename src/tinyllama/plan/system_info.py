"""What this machine has: looked at once, into one frozen record.

Reads the system, torch and the installed packages' metadata; writes nothing. Everything that is judged of it is judged
elsewhere (`checks`, `needs`), by pure functions, so that machines which nobody has at hand can be judged in tests.
"""

import platform
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyllama import hardware
from tinyllama.hardware import available_cpu_count

_NOT_FOR_USERS = ("all", "dev")
_ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Device:
    """A GPU, as torch sees it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """CUDA's compute capability, such as (9, 0)."""
    bf16: bool
    """Whether its products know bf16."""

    @property
    def float8(self) -> bool:
        """Whether its products know float8: Ada and Hopper on."""
        return self.capability >= (8, 9)


@dataclass(frozen=True)
class SystemInfo:
    """What was found; bytes and counts, nothing judged."""

    python: str
    system: str
    version: str
    """Of this package."""
    torch: str
    cuda: str | None
    """Of torch's build; None where it was built for CPUs alone."""
    cores: int
    """That this process may use."""
    memory_bytes: int
    """Of the machine, or of the container if that has less."""
    shared_memory_bytes: int | None
    """Size of /dev/shm; None where there is none."""
    open_files: int
    """That a process may have open; -1 is any number."""
    can_compile: bool
    """Whether there are a C++ compiler and Python's headers."""
    has_nvidia_driver: bool
    devices: tuple[Device, ...] = ()
    attention: tuple[str, ...] = ()
    """torch's kernels that computed something on the first device."""
    back_ends: tuple[str, ...] = ()
    """torch.distributed's."""
    required: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By extra, `""` for none: what is not installed, or in another version, in words."""
    offline_tasks: tuple[str, ...] = ()
    """Evaluation tasks whose items are installed."""


def probe() -> SystemInfo:
    """Look at this machine; takes as long as importing torch."""
    devices = tuple(_devices())
    return SystemInfo(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        version=version("tinyllama"),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cores=available_cpu_count(),
        memory_bytes=hardware.total_memory_bytes(),
        shared_memory_bytes=_size_of_disk(Path("/dev/shm")),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        can_compile=hardware.can_compile(torch.device("cpu")),
        has_nvidia_driver=Path("/proc/driver/nvidia/version").is_file(),
        devices=devices,
        attention=tuple(_attention(torch.device("cuda" if devices else "cpu"))),
        back_ends=tuple(_back_ends()),
        required=unmet_requirements("tinyllama"),
        offline_tasks=tuple(_offline_tasks()),
    )


def _devices() -> Iterator[Device]:
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(number)
        # Before Ampere, (8, 0), bf16 is emulated, and torch.cuda.is_bf16_supported() says yes to it.
        yield Device(found.name, found.total_memory, (found.major, found.minor), (found.major, found.minor) >= (8, 0))


def _attention(device: torch.device) -> Iterator[str]:
    """The kernels that a small causal attention runs with."""
    query = torch.ones(1, 4, 128, 64, dtype=torch.bfloat16, device=device)
    for name, kernel in _ATTENTION.items():
        try:
            with sdpa_kernel(kernel):
                F.scaled_dot_product_attention(query, query, query, is_causal=True)
        except RuntimeError:
            continue
        yield name


def _back_ends() -> Iterator[str]:
    has = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    yield from (name for name, is_there in has.items() if dist.is_available() and is_there())


def _size_of_disk(path: Path) -> int | None:
    return shutil.disk_usage(path).total if path.is_dir() else None


def free_bytes(path: Path) -> int:
    """Free bytes of the disk on which a path lies, or would lie."""
    return shutil.disk_usage(_existing(path)).free


def disk_of(path: Path) -> int:
    """A number for the disk on which a path lies, or would lie."""
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def unmet_requirements(package: str) -> dict[str, tuple[str, ...]]:
    """By extra, `""` for none: which of a package's requirements are not met, such as `torch is 2.1, not ~=2.13`."""
    asked = [Requirement(words) for words in requires(package) or ()]
    named = {str(one.marker).rpartition('extra == "')[2].rstrip('"') for one in asked if "extra" in str(one.marker)}
    extras = [name for name in sorted(named) if name not in _NOT_FOR_USERS]
    plain = {"": [one for one in asked if "extra ==" not in str(one.marker)]}
    groups = plain | {extra: [one for one in asked if _belongs(one, extra)] for extra in extras}
    return {extra: tuple(_unmet(requirements, extra)) for extra, requirements in groups.items()}


def _belongs(requirement: Requirement, extra: str) -> bool:
    return f'extra == "{extra}"' in str(requirement.marker)


def _unmet(requirements: list[Requirement], extra: str) -> Iterator[str]:
    for one in requirements:
        if one.marker and not one.marker.evaluate({"extra": extra}):
            continue
        try:
            here = version(one.name)
        except PackageNotFoundError:
            yield f"{one.name} is missing"
            continue
        if not one.specifier.contains(here, prereleases=True):
            yield f"{one.name} is {here}, not {one.specifier}"


def _offline_tasks() -> Iterator[str]:
    try:
        from tinyllama.evaluate.tasks import OFFLINE_TASKS, available_offline  # noqa: PLC0415 - an extra's
    except ModuleNotFoundError:
        return
    yield from filter(available_offline, OFFLINE_TASKS)
