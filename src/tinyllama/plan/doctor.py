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
from tinyllama.plan.system_info import CheckResult, Device, Status, SystemInfo, probe
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


def _result(section: str, what: str, found: str, remedy: str = "", status: Status = "warning") -> CheckResult:
    """Return a result with this status where there is a remedy, else `ok`."""
    return CheckResult(section, what, found, status if remedy else "ok", remedy)


def _check_software(found: SystemInfo) -> Iterator[CheckResult]:
    unmet = ", ".join(found.unmet.get("", ()))
    yield _result("software", "Python", f"{found.python}, {found.system}")
    yield _result(
        "software", "tinyllama", ": ".join(filter(None, (found.version, unmet))),
        "pip install tinyllama" if unmet else "", "missing",
    )  # fmt: skip
    build = f"CUDA {found.cuda}" if found.cuda else "CPUs only"
    yield _result("software", "torch", f"{found.torch}, built for {build}")
    if found.can_compile:
        yield _result("software", "torch.compile", "a C++ compiler and Python's headers")
    else:
        remedy = "install g++ and Python's headers (Debian: g++ python3-dev)"
        yield _result("software", "torch.compile", "no C++ compiler, or no Python.h", remedy)
    yield _result("software", "distributed", ", ".join(found.backends) or "none")


def _check_devices(found: SystemInfo) -> Iterator[CheckResult]:
    for number, device in enumerate(found.devices):
        yield _check_gpu(f"GPU {number}", device)
    if not found.devices and not found.has_nvidia_driver:
        yield _result("devices", "GPU", "none; training runs on the CPU")
    elif not found.devices and found.cuda is None:
        yield _result("devices", "GPU", "a driver, but torch is built for CPUs only", "install torch's CUDA build")
    elif not found.devices:
        remedy = f"install a driver for CUDA {found.cuda}; see nvidia-smi and CUDA_VISIBLE_DEVICES"
        yield _result("devices", "GPU", "a driver, but torch sees no GPU", remedy)
    implementation = "torch's " if found.devices else "tinyllama's; torch's "
    yield _result("devices", "attention", implementation + (", ".join(found.attention) or "none"))
    if len(found.devices) > 1 and "nccl" not in found.backends:
        yield _result("devices", "several GPUs", "torch has no NCCL", "install torch's CUDA build", "missing")


def _check_gpu(what: str, device: Device) -> CheckResult:
    major, minor = device.capability
    types = ", ".join(name for name, has_type in (("bf16", device.bf16), ("float8", device.float8)) if has_type)
    capability = f"compute capability {major}.{minor}: {types or 'no bf16'}"
    remedy = "" if device.bf16 else "train with --train.precision fp32"
    return _result("devices", what, f"{device.name}, {format_bytes(device.memory_bytes)}, {capability}", remedy)


def _check_system(found: SystemInfo) -> Iterator[CheckResult]:
    yield _result("system", "CPU cores", str(found.cores))
    yield _result("system", "memory", format_bytes(found.memory_bytes))
    if found.shared_memory_bytes is not None:
        is_small = len(found.devices) > 1 and found.shared_memory_bytes < _MIN_SHARED_MEMORY_BYTES
        remedy = "start the container with --ipc=host or --shm-size=8g" if is_small else ""
        yield _result("system", "/dev/shm", format_bytes(found.shared_memory_bytes), remedy)
    limit = f"{found.open_files:,}" if found.open_files >= 0 else "no limit"
    yield _result("system", "open files", limit, "ulimit -n 65536" if 0 <= found.open_files < _MIN_OPEN_FILES else "")


def _check_extras(found: SystemInfo) -> Iterator[CheckResult]:
    for extra, unmet in sorted(found.unmet.items()):
        if extra:
            remedy = f'pip install "tinyllama[{extra}]", {_EXTRAS[extra]}' if unmet else ""
            yield _result("extras", extra, ", ".join(unmet) or "installed", remedy)
    yield _result("extras", "items without the hub", ", ".join(found.offline_tasks) or "of no task")
