"""`tinyllama doctor`: the facts about this machine and the unmet needs of a recipe, as a table or as JSON.

Without a recipe, only two problems have the status `missing`: an unmet requirement of the package, and a torch without
NCCL on a machine with several GPUs. For a recipe, `doctor` calls the same checks as `prepare` and `train`, so their
messages are the same. The checks of memory and disk space use the estimates of `tinyllama plan`. The checks write
nothing in the recipe's folders. If the recipe names a hub repository, the checks download the repository's tokenizer
files and nothing else.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

from rich.text import Text

from tinyllama import preflight
from tinyllama.data.store import TokenStore
from tinyllama.distributed import select_device
from tinyllama.errors import InputError
from tinyllama.evaluate.items import FETCH_COMMAND
from tinyllama.files import disk_usage_bytes
from tinyllama.formatting import echo, format_bytes, format_table, print_json
from tinyllama.hardware import FP16_ON_CPU_WARNING, HardwareSpec, check_bf16
from tinyllama.model.flops import LLAMA_2_VOCAB_SIZE
from tinyllama.plan.estimate import Assumptions, Plan, estimate
from tinyllama.plan.system_info import SystemInfo, probe
from tinyllama.prepare.files import is_remote
from tinyllama.prepare.selection import first_document
from tinyllama.prepare.sources import list_files
from tinyllama.recipe import Cleaning, Recipe, Source
from tinyllama.runs.run_dir import RunDir
from tinyllama.text import iter_utf8_chunks

# Functions import the libraries of optional stages themselves, because these imports take seconds.
# ruff: noqa: PLC0415

Status = Literal["ok", "warning", "missing"]

_COLOURS = {"ok": "green", "warning": "yellow", "missing": "bold red"}
_EXCERPT_CHARACTERS = 40
_MIN_OPEN_FILES = 1024
"""Recommended limit of open files: a shard has two files, and a store of many sources has hundreds of shards."""
_MIN_SHARED_MEMORY_BYTES = 1 << 30
"""Recommended size of /dev/shm: NCCL needs tens of MB per GPU, and a container has 64 MB by default."""
_COMPILER_REMEDY = "install g++ and Python's headers (Debian: g++ python3-dev), unless the GPU is older than Volta"
_EXTRAS = {
    "clean": "for data.sources.*.clean",
    "evaluate": "for scores",
    "float8": "for train.float8",
    "formats": "for GGUF and CTranslate2, and to verify releases",
    "ray": "for data.executor: ray",
    "track": "for track.wandb and track.tensorboard",
}


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    section: str
    """Section of the output that lists the result."""
    what: str
    found: str
    """The fact, or `problem; remedy`."""
    status: Status = "ok"
    """`warning`: tinyllama works, but with a restriction. `missing`: an operation would fail."""


def show_doctor(recipe: Recipe | None, as_json: bool) -> int:
    """Print the facts about this machine and the unmet needs of a recipe; return 1 if anything is missing, else 0."""
    system = probe()
    results = [*check_machine(system), *(check_recipe(recipe, system) if recipe else ())]
    missing = [result.what for result in results if result.status == "missing"]
    if as_json:
        output = {"machine": asdict(system), "checks": [asdict(result) for result in results], "missing": missing}
        print_json(output | {"recipe": recipe.name if recipe else None})
    else:
        _print_results(results)
        echo(verdict(recipe.name if recipe else None, results))
    return 1 if missing else 0


def _print_results(results: Sequence[CheckResult]) -> None:
    rows: list[list[str | Text]] = []
    for section, members in groupby(results, lambda result: result.section):
        rows.append(["", Text(section, style="bold"), ""])
        rows += [[Text(one.status, style=_COLOURS[one.status]), f"  {one.what}", one.found] for one in members]
    lines = format_table(("", "what", "found; remedy"), rows, max_width=160)
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
    return CheckResult(section, what, f"{found}; {remedy}" if remedy else found, status if remedy else "ok")


def _check_software(system: SystemInfo) -> Iterator[CheckResult]:
    result, unmet = partial(_result, "software"), system.unmet.get("", ())
    yield result("Python", f"{system.python}, {system.system}")
    version = ": ".join((system.version, *([", ".join(unmet)] if unmet else ())))
    yield result("tinyllama", version, "pip install tinyllama" if unmet else "", "missing")
    yield result("torch", f"{system.torch}, built for {f'CUDA {system.cuda}' if system.cuda else 'CPUs only'}")
    if system.can_compile:
        yield result("torch.compile", "a compiler and Python's headers")
    else:
        yield result("torch.compile", "no compiler, no Python.h, or a GPU older than Volta", _COMPILER_REMEDY)
    yield result("distributed", ", ".join(system.backends) or "none")


def _check_devices(system: SystemInfo) -> Iterator[CheckResult]:
    result = partial(_result, "devices")
    for number, device in enumerate(system.devices):
        types = {"bf16": "bf16", "fp16": "fp16, no bf16", "fp32": "no bf16"}[device.precision]
        types += ", float8" if device.float8 else ""
        found = f"{device.name}, {format_bytes(device.memory_bytes)}"
        found += f", compute capability {'.'.join(map(str, device.capability))}: {types}"
        remedy = "" if device.precision == "bf16" else f"train with --train.precision {device.precision}"
        yield result(f"GPU {number}", found, remedy)
    if not system.devices and not system.has_nvidia_gpu:
        yield result("GPU", "none: training runs on the CPU")
    elif not system.devices and system.cuda is None:
        yield result("GPU", "an NVIDIA GPU, but torch is built for CPUs only", "install torch's CUDA build")
    elif not system.devices:
        remedy = f"install a driver for CUDA {system.cuda}; see nvidia-smi and CUDA_VISIBLE_DEVICES"
        yield result("GPU", "an NVIDIA GPU, but torch sees none", remedy)
    implementation = "torch's " if system.devices else "tinyllama's; torch's "
    yield result("attention", implementation + (", ".join(system.attention) or "none"))
    if len(system.devices) > 1 and "nccl" not in system.backends:
        yield result("several GPUs", "torch has no NCCL", "install torch's CUDA build", "missing")


def _check_system(system: SystemInfo) -> Iterator[CheckResult]:
    result, shared = partial(_result, "system"), system.shared_memory_bytes
    yield result("CPU cores", str(system.cores))
    yield result("memory", format_bytes(system.memory_bytes))
    if shared is not None:
        is_small = len(system.devices) > 1 and shared < _MIN_SHARED_MEMORY_BYTES
        remedy = "start the container with --ipc=host or --shm-size=8g" if is_small else ""
        yield result("/dev/shm", format_bytes(shared), remedy)
    limit = f"{system.open_files:,}" if system.open_files >= 0 else "no limit"
    yield result("open files", limit, "ulimit -n 65536" if 0 <= system.open_files < _MIN_OPEN_FILES else "")


def _check_extras(system: SystemInfo) -> Iterator[CheckResult]:
    for extra in sorted(system.unmet.keys() - {""}):
        unmet = ", ".join(system.unmet[extra])
        remedy = f'pip install "tinyllama[{extra}]", {_EXTRAS[extra]}' if unmet else ""
        yield _result("extras", extra, unmet or "installed", remedy)
    items = ", ".join(system.offline_tasks) or f"none; the first evaluation or `{FETCH_COMMAND}` downloads them"
    yield _result("extras", "evaluation items", items)


def check_recipe(recipe: Recipe, system: SystemInfo) -> list[CheckResult]:
    """Check everything that a recipe needs, and return the results."""
    vocab_size, findings, store = recipe.vocab_size or LLAMA_2_VOCAB_SIZE, dict[str, CheckResult](), None
    try:
        tokenizer = preflight.load_tokenizer(recipe)
    except InputError as problem:
        first = _recipe_result("tokenizer", str(problem), "missing")
    else:
        vocab_size = tokenizer.vocab_size
        first = _recipe_result("tokenizer", f"{recipe.tokenizer}: {vocab_size:,} tokens")
        for finding in preflight.findings(recipe, tokenizer):
            status: Status = "missing" if finding.stops else "warning"
            findings[finding.what] = _recipe_result(finding.what, str(finding.problem), status)
    try:
        store = preflight.open_store(recipe)
    except InputError as problem:
        second = _recipe_result("token store", str(problem), "warning")
    else:
        tokens = sum(split.num_tokens for split in store.splits.values())
        second = _recipe_result("token store", f"{recipe.data.store}: {tokens:,} tokens")
    results = [first, second, *_check_data(recipe, store is not None), *_check_libraries(recipe, system)]
    # A finding of the preflight checks replaces the result of the same name.
    results = [*(findings.pop(result.what, result) for result in results), *findings.values()]
    warnings = preflight.recipe_warnings(recipe, len(system.devices) or 1, store)  # `train` prints the same warnings
    results += [_recipe_result("settings", warning, "warning") for warning in warnings]
    return [*results, *check_sizes(recipe, vocab_size, system, disk_and_free_bytes)]


def _recipe_result(what: str, found: str, status: Status = "ok") -> CheckResult:
    return CheckResult("recipe", what, found, status)


def _run_check(what: str, found: str, check: Callable[[], object]) -> CheckResult:
    """Run a check; return a result with the text `found`, or with the message of its InputError."""
    try:
        check()
    except InputError as problem:
        return _recipe_result(what, str(problem), "missing")
    return _recipe_result(what, found)


def _check_data(recipe: Recipe, has_store: bool) -> Iterator[CheckResult]:
    """Check the initial weights, the raw files and the first row of each source.

    A recipe with a complete store needs no raw files.
    """
    for name, source in recipe.data.sources.items():
        what = f"raw files of {name}"
        try:
            yield _recipe_result(what, _read_first_document(name, source))
        except InputError as problem:
            note = "; needed only to prepare again" if has_store else ""
            yield _recipe_result(what, f"{problem}{note}", "warning" if has_store else "missing")
    if initial := recipe.train.initial_weights:
        if Path(initial).exists():
            yield _recipe_result("initial weights", initial)
        else:
            yield _recipe_result(
                "initial weights", f"{initial}: no such folder; `train` will look on the hub", "warning"
            )


def _read_first_document(name: str, source: Source) -> str:
    """Describe a source's files and its first document; remote files are only listed, to avoid their download."""
    files = list_files(name, source)
    listed = f"{len(files):,} files, {format_bytes(sum(file.size for file in files))}"
    if is_remote(source.path):
        return listed
    path, row = first_document(name, source, files)
    size = sum(map(len, iter_utf8_chunks(row.text)))
    beginning = next(iter_utf8_chunks(row.text, _EXCERPT_CHARACTERS)).decode()
    return f"{listed}; row {row.row} of {path} has {size:,} bytes of text: {beginning!r}"


def _check_libraries(recipe: Recipe, system: SystemInfo) -> Iterator[CheckResult]:
    """Check the GPU, and the libraries, programs and GPU features that the recipe's fields need."""
    from tinyllama.release.formats import check_format_libraries
    from tinyllama.tracking.trackers import check_trackers, enabled_trackers

    train, formats = recipe.train, recipe.release.formats
    try:
        select_device(0)  # refuses a GPU that torch cannot use, as `train` does
    except InputError as problem:
        yield _recipe_result("GPU", str(problem), "missing")
    yield _run_check("release.formats", ", ".join(formats), lambda: check_format_libraries(formats))
    yield from _check_tasks(recipe, system)
    trackers = ", ".join(enabled_trackers(recipe.track)) or "nothing"
    yield _run_check("track", trackers, lambda: check_trackers(recipe.track))
    if cleaned := [name for name, source in recipe.data.sources.items() if source.clean != Cleaning()]:
        from tinyllama.prepare.cleaning import check_cleaning

        yield _run_check("data.sources.*.clean", ", ".join(cleaned), lambda: check_cleaning(recipe))
    yield _check_executor(recipe.data.executor, system)
    if train.compile and not system.can_compile:
        yield _recipe_result(
            "train.compile", f"not possible here: training runs uncompiled; {_COMPILER_REMEDY}", "warning"
        )
    if train.float8:
        yield check_float8_support(system)
    for device in system.devices:
        try:
            check_bf16(train.precision, train.optimizer.name, device.name, device.capability)
        except InputError as problem:
            yield _recipe_result("bf16", str(problem), "missing")
            break
    if train.precision == "fp16" and not system.devices:
        yield _recipe_result("train.precision", FP16_ON_CPU_WARNING, "warning")


def _check_tasks(recipe: Recipe, system: SystemInfo) -> Iterator[CheckResult]:
    from tinyllama.evaluate.evaluation import check_tasks

    by_field = {"release.tasks": recipe.release.tasks, "train.evaluate_tasks": recipe.train.evaluated_tasks}
    used = {field: tasks for field, tasks in by_field.items() if tasks}
    results = [_run_check(field, ", ".join(tasks), partial(check_tasks, tasks)) for field, tasks in used.items()]
    yield from results
    tasks = dict.fromkeys(task for tasks in used.values() for task in tasks)
    missing = [task for task in tasks if task not in system.offline_tasks]
    if not results or any(result.status != "ok" for result in results):
        return
    if missing:
        remedy = f"a connection at the first evaluation, or for most tasks `{FETCH_COMMAND}` before it"
        yield _recipe_result("items of the tasks", f"not on this machine: {', '.join(missing)}; {remedy}", "warning")
    else:
        yield _recipe_result("items of the tasks", "on this machine")


def _check_executor(executor: str, system: SystemInfo) -> CheckResult:
    if executor == "slurm" and shutil.which("sbatch") is None:
        return _recipe_result(
            "data.executor", "slurm, but no sbatch; prepare on a login node of the cluster", "missing"
        )
    if executor == "ray" and (unmet := system.unmet.get("ray")):
        return _recipe_result("data.executor", f'{", ".join(unmet)}; pip install "tinyllama[ray]"', "missing")
    return _recipe_result("data.executor", executor)


def check_float8_support(system: SystemInfo) -> CheckResult:
    """Check that torchao is installed and every GPU supports float8 matrix products."""
    if unmet := system.unmet.get("float8"):
        return _recipe_result("train.float8", f'{", ".join(unmet)}; pip install "tinyllama[float8]"', "missing")
    if not system.devices or not all(device.float8 for device in system.devices):
        problem = "no float8 matrix products on this machine; remove train.float8, or use Ada, Hopper or newer GPUs"
        return _recipe_result("train.float8", problem, "missing")
    return _recipe_result("train.float8", "torchao, and GPUs with float8 matrix products")


def check_sizes(
    recipe: Recipe, vocab_size: int, system: SystemInfo, free: Callable[[Path], tuple[int, int]]
) -> list[CheckResult]:
    """Check the plan's batch, memory and disk space; `free` returns the device number and the free bytes of a path."""
    ranks = len(system.devices) or 1
    memory = min((device.memory_bytes for device in system.devices), default=system.memory_bytes)
    # The checks do not use the estimated duration, so all speeds are placeholders.
    spec = HardwareSpec("this machine", 1.0, 1.0, memory, 1.0, 1.0, "doctor", is_cpu=not system.devices)
    try:
        plan = estimate(recipe, vocab_size, spec, Assumptions(gpus=ranks))
    except InputError as problem:
        return [_recipe_result("batch", str(problem), "missing")]
    per_rank = f"{recipe.train.sequences_per_rank(ranks):,} sequences per rank" if ranks > 1 else "in one process"
    batch = _recipe_result("batch", f"{recipe.train.batch_sequences:,} sequences per step, {per_rank}")
    return [batch, _check_memory(plan), *_check_disks(plan, free)]


def _check_memory(plan: Plan) -> CheckResult:
    figures, where = plan.figures, "this machine" if plan.hardware.is_cpu else "one GPU"
    needed, available = format_bytes(figures["memory_bytes_per_gpu"]), format_bytes(plan.hardware.memory_bytes)
    found, totals = f"{needed} of {where}'s {available}", figures["memory_bytes_by_activation_checkpointing"]
    choice = min(totals, key=lambda name: totals[name])
    if figures["memory_fits"]:
        remedy = ""
    elif largest := figures["largest_micro_batch_sequences"]:
        remedy = f"--train.micro_batch_sequences {largest}"
    elif totals[choice] <= figures["usable_memory_bytes"]:
        remedy = f"--parallel.activation_checkpointing {choice}"
    else:
        remedy = f"more or larger GPUs: tinyllama plan {plan.recipe.name} --gpus 8"
    return _result("recipe", "memory", found, remedy, "missing")


def disk_and_free_bytes(path: Path) -> tuple[int, int]:
    """Return the device number and the free bytes of a path's disk; the path need not exist yet."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return existing.stat().st_dev, shutil.disk_usage(existing).free


def _check_disks(plan: Plan, free: Callable[[Path], tuple[int, int]]) -> Iterator[CheckResult]:
    """Check each disk; yield results with the bytes to be written and the free space."""
    run, store = RunDir.of_recipe(plan.recipe), Path(plan.recipe.data.store)
    run_bytes = plan.figures["checkpoints_bytes"] + plan.figures["releases_bytes"]
    run_bytes -= sum(disk_usage_bytes(path) for path in (run.checkpoints_dir, run.releases.path))
    store_bytes = 0 if TokenStore.exists(store) else plan.figures["store_bytes"] - disk_usage_bytes(store)
    disks: dict[int, list[tuple[Path, str, int]]] = {}
    for path, name, size in ((run.path, "checkpoints and releases", run_bytes), (store, "token store", store_bytes)):
        disks.setdefault(free(path)[0], []).append((path, name, max(0, size)))
    for parts in disks.values():
        path, total = parts[0][0], sum(size for _, _, size in parts)
        needed = ", ".join(f"{format_bytes(size)} for {name}" for _, name, size in parts if size) or "nothing more"
        available = free(path)[1]
        found = f"{needed}, {format_bytes(available)} free at {path.parent}/"
        remedy = f"free {format_bytes(total - available)}, or use another disk" if total > available else ""
        yield _result("recipe", "disk", found, remedy, "missing")
