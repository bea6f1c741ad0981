"""`tinyllama doctor`: the facts about this machine and the unmet needs of a recipe, as a table or as JSON.

Without a recipe, only two problems have the status `missing`: an unmet requirement of the package, and a torch without
NCCL on a machine with several GPUs. `recipe_checks` checks the needs of a recipe.
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
"""Recommended limit of open files: a shard has two files, and a store of many sources has hundreds of shards."""
_MIN_SHARED_MEMORY_BYTES = 1 << 30
"""Recommended size of /dev/shm: NCCL needs tens of MB per GPU, and a container has 64 MB by default."""
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
    """Print the facts about this machine and the unmet needs of a recipe; return 1 if anything is missing, else 0."""
    system = probe()
    results = [*check_machine(system), *(check_recipe(recipe, system) if recipe else ())]
    if as_json:
        missing = [result.what for result in results if result.status == "missing"]
        output = {"machine": asdict(system), "checks": [asdict(result) for result in results], "missing": missing}
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
    print("\n".join(lines))  # noqa: T201 - the lines are escaped, and `echo` would escape their colour codes


def verdict(recipe: str | None, results: Sequence[CheckResult]) -> str:
    """Format the last line, which names the missing items or reports that nothing is missing."""
    subject = f"{recipe}: " if recipe else ""
    if missing := [result.what for result in results if result.status == "missing"]:
        return f"\n{subject}missing: {', '.join(missing)}"
    warnings = sum(result.status == "warning" for result in results)
    return f"\n{subject}nothing is missing" + (f"; warnings: {warnings}" if warnings else "")


def check_machine(system: SystemInfo) -> list[CheckResult]:
    """Run the checks that need no recipe, and return their results."""
    return [*_check_software(system), *_check_devices(system), *_check_system(system), *_check_extras(system)]


def _result(section: str, what: str, found: str, remedy: str = "", status: Status = "warning") -> CheckResult:
    """Return a result with the status `status` if there is a remedy, else with the status `ok`."""
    return CheckResult(section, what, found, status if remedy else "ok", remedy)


def _check_software(system: SystemInfo) -> Iterator[CheckResult]:
    unmet = ", ".join(system.unmet.get("", ()))
    yield _result("software", "Python", f"{system.python}, {system.system}")
    yield _result(
        "software", "tinyllama", ": ".join(filter(None, (system.version, unmet))),
        "pip install tinyllama" if unmet else "", "missing",
    )  # fmt: skip
    build = f"CUDA {system.cuda}" if system.cuda else "CPUs only"
    yield _result("software", "torch", f"{system.torch}, built for {build}")
    if system.can_compile:
        yield _result("software", "torch.compile", "a C++ compiler and Python's headers")
    else:
        remedy = "install g++ and Python's headers (Debian: g++ python3-dev)"
        yield _result("software", "torch.compile", "no C++ compiler, or no Python.h", remedy)
    yield _result("software", "distributed", ", ".join(system.backends) or "none")


def _check_devices(system: SystemInfo) -> Iterator[CheckResult]:
    for number, device in enumerate(system.devices):
        yield _check_gpu(f"GPU {number}", device)
    if not system.devices and not system.has_nvidia_driver:
        yield _result("devices", "GPU", "none; training runs on the CPU")
    elif not system.devices and system.cuda is None:
        yield _result("devices", "GPU", "a driver, but torch is built for CPUs only", "install torch's CUDA build")
    elif not system.devices:
        remedy = f"install a driver for CUDA {system.cuda}; see nvidia-smi and CUDA_VISIBLE_DEVICES"
        yield _result("devices", "GPU", "a driver, but torch sees no GPU", remedy)
    implementation = "torch's " if system.devices else "tinyllama's; torch's "
    yield _result("devices", "attention", implementation + (", ".join(system.attention) or "none"))
    if len(system.devices) > 1 and "nccl" not in system.backends:
        yield _result("devices", "several GPUs", "torch has no NCCL", "install torch's CUDA build", "missing")


def _check_gpu(what: str, device: Device) -> CheckResult:
    major, minor = device.capability
    types = ", ".join(name for name, has_type in (("bf16", device.bf16), ("float8", device.float8)) if has_type)
    capability = f"compute capability {major}.{minor}: {types or 'no bf16'}"
    remedy = "" if device.bf16 else "train with --train.precision fp32"
    return _result("devices", what, f"{device.name}, {format_bytes(device.memory_bytes)}, {capability}", remedy)


def _check_system(system: SystemInfo) -> Iterator[CheckResult]:
    yield _result("system", "CPU cores", str(system.cores))
    yield _result("system", "memory", format_bytes(system.memory_bytes))
    if system.shared_memory_bytes is not None:
        is_small = len(system.devices) > 1 and system.shared_memory_bytes < _MIN_SHARED_MEMORY_BYTES
        remedy = "start the container with --ipc=host or --shm-size=8g" if is_small else ""
        yield _result("system", "/dev/shm", format_bytes(system.shared_memory_bytes), remedy)
    limit = f"{system.open_files:,}" if system.open_files >= 0 else "no limit"
    yield _result("system", "open files", limit, "ulimit -n 65536" if 0 <= system.open_files < _MIN_OPEN_FILES else "")


def _check_extras(system: SystemInfo) -> Iterator[CheckResult]:
    for extra, unmet in sorted(system.unmet.items()):
        if extra:
            remedy = f'pip install "tinyllama[{extra}]", {_EXTRAS[extra]}' if unmet else ""
            yield _result("extras", extra, ", ".join(unmet) or "installed", remedy)
    yield _result("extras", "items without the hub", ", ".join(system.offline_tasks) or "of no task")
