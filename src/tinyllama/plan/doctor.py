"""`tinyllama doctor`: what this machine has and what a recipe lacks, as a table or as JSON, and the exit status.

Without a recipe only unmet requirements of the package, and NCCL for several GPUs, are `missing`. What a recipe needs
is in `recipe_checks`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.text import Text

from tinyllama.formatting import echo, format_bytes, format_table
from tinyllama.plan.recipe_checks import check_recipe
from tinyllama.plan.system_info import CheckResult, Device, SystemInfo, probe
from tinyllama.recipe import Recipe

_COLOURS = {"ok": "green", "warning": "yellow", "missing": "bold red"}
_MIN_OPEN_FILES = 1024
"""A shard of the store has two files, and a store of many sources has hundreds of shards."""
_MIN_SHARED_MEMORY_BYTES = 1 << 30
"""NCCL needs tens of MB per GPU; a container has 64 MB by default."""
_EXTRAS = {
    "clean": "for data.sources.*.clean",
    "evaluate": "for scores",
    "float8": "for train.float8",
    "formats": "for GGUF and CTranslate2, and to verify releases",
    "offline": "for the evaluation tasks' items without the hub",
    "ray": "for data.executor: ray",
    "track": "for track.wandb and track.tensorboard",
}


def show_doctor(recipe: Recipe | None, as_json: bool) -> int:
    """Print what this machine has, and what a recipe lacks; return exit status 1 where something is missing."""
    found = probe()
    results = [*check_machine(found), *(check_recipe(recipe, found) if recipe else ())]
    if as_json:
        missing = [result.what for result in results if result.status == "missing"]
        output = {"machine": asdict(found), "checks": [asdict(result) for result in results], "missing": missing}
        echo(json.dumps(output | {"recipe": recipe.name if recipe else None}, indent=2))
    else:
        _print_results(results)
        echo(verdict(recipe.name if recipe else None, results))
    return 1 if any(result.status == "missing" for result in results) else 0


def _print_results(results: Sequence[CheckResult]) -> None:
    rows: list[list[str | Text]] = []
    for number, result in enumerate(results):
        if number == 0 or result.section != results[number - 1].section:
            rows.append(["", Text(result.section, style="bold"), "", ""])
        status = Text(result.status, style=_COLOURS[result.status])
        rows.append([status, f"  {result.what}", result.found, result.remedy])
    lines = format_table(("", "what", "found", "remedy"), rows, max_width=160)
    print("\n".join(lines))  # noqa: T201 - the lines are visible, their colours are not text


def verdict(recipe: str | None, results: Sequence[CheckResult]) -> str:
    """Return the last line: what is missing, or that nothing is."""
    subject = f"{recipe}: " if recipe else ""
    if missing := [result.what for result in results if result.status == "missing"]:
        return f"\n{subject}missing: {', '.join(missing)}"
    warnings = sum(result.status == "warning" for result in results)
    return f"\n{subject}nothing is missing" + (f"; warnings: {warnings}" if warnings else "")


def check_machine(found: SystemInfo) -> list[CheckResult]:
    """Return the results that need no recipe."""
    return [*_check_software(found), *_check_devices(found), *_check_system(found), *_check_extras(found)]


def _check_software(found: SystemInfo) -> Iterator[CheckResult]:
    section = "software"
    yield CheckResult(section, "Python", f"{found.python}, {found.system}")
    if unmet := found.unmet.get("", ()):
        requirements = f"{found.version}: {', '.join(unmet)}"
        yield CheckResult(section, "tinyllama", requirements, "missing", "pip install tinyllama")
    else:
        yield CheckResult(section, "tinyllama", found.version)
    yield CheckResult(
        section, "torch", f"{found.torch}, built for {f'CUDA {found.cuda}' if found.cuda else 'CPUs only'}"
    )
    if found.can_compile:
        yield CheckResult(section, "torch.compile", "a C++ compiler and Python's headers")
    else:
        remedy = "install g++ and Python's headers (Debian: g++ python3-dev)"
        yield CheckResult(section, "torch.compile", "no C++ compiler, or no Python.h", "warning", remedy)
    yield CheckResult(section, "distributed", ", ".join(found.backends) or "none")


def _check_devices(found: SystemInfo) -> Iterator[CheckResult]:
    section = "devices"
    for number, device in enumerate(found.devices):
        yield _check_gpu(f"GPU {number}", device)
    if not found.devices and not found.has_nvidia_driver:
        yield CheckResult(section, "GPU", "none; training runs on the CPU")
    elif not found.devices and found.cuda is None:
        problem = "a driver, but torch is built for CPUs only"
        yield CheckResult(section, "GPU", problem, "warning", "install torch's CUDA build")
    elif not found.devices:
        remedy = f"install a driver for CUDA {found.cuda}; see nvidia-smi and CUDA_VISIBLE_DEVICES"
        yield CheckResult(section, "GPU", "a driver, but torch sees no GPU", "warning", remedy)
    implementation = "torch's " if found.devices else "tinyllama's; torch's "
    yield CheckResult(section, "attention", implementation + (", ".join(found.attention) or "none"))
    if len(found.devices) > 1 and "nccl" not in found.backends:
        yield CheckResult(section, "several GPUs", "torch has no NCCL", "missing", "install torch's CUDA build")


def _check_gpu(what: str, device: Device) -> CheckResult:
    major, minor = device.capability
    types = ", ".join(name for name, has_type in (("bf16", device.bf16), ("float8", device.float8)) if has_type)
    capability = f"compute capability {major}.{minor}: {types or 'no bf16'}"
    found = f"{device.name}, {format_bytes(device.memory_bytes)}, {capability}"
    if device.bf16:
        return CheckResult("devices", what, found)
    return CheckResult("devices", what, found, "warning", "train with --train.precision fp32")


def _check_system(found: SystemInfo) -> Iterator[CheckResult]:
    section = "system"
    yield CheckResult(section, "CPU cores", str(found.cores))
    yield CheckResult(section, "memory", format_bytes(found.memory_bytes))
    if found.shared_memory_bytes is not None:
        size = format_bytes(found.shared_memory_bytes)
        if len(found.devices) > 1 and found.shared_memory_bytes < _MIN_SHARED_MEMORY_BYTES:
            remedy = "start the container with --ipc=host or --shm-size=8g"
            yield CheckResult(section, "/dev/shm", size, "warning", remedy)
        else:
            yield CheckResult(section, "/dev/shm", size)
    if 0 <= found.open_files < _MIN_OPEN_FILES:
        yield CheckResult(section, "open files", f"{found.open_files:,}", "warning", "ulimit -n 65536")
    else:
        yield CheckResult(section, "open files", f"{found.open_files:,}" if found.open_files >= 0 else "no limit")


def _check_extras(found: SystemInfo) -> Iterator[CheckResult]:
    for extra in sorted(found.unmet.keys() - {""}):
        if unmet := found.unmet[extra]:
            remedy = f'pip install "tinyllama[{extra}]", {_EXTRAS[extra]}'
            yield CheckResult("extras", extra, ", ".join(unmet), "warning", remedy)
        else:
            yield CheckResult("extras", extra, "installed")
    yield CheckResult("extras", "items without the hub", ", ".join(found.offline_tasks) or "of no task")
