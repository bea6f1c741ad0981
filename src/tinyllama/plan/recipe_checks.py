"""Checks of whether a machine meets the needs of a recipe's next stages.

This module calls the stages' own checks, so that `doctor` and the stages print the same messages. The plan computes
memory and disk space. The checks read the recipe's folders and write nothing. If the recipe names a hub repository, the
checks download the repository's tokenizer files and nothing else.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from tinyllama import preflight
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.files import disk_usage_bytes
from tinyllama.formatting import format_bytes
from tinyllama.hardware import HARDWARE_SPECS, spec_for_device
from tinyllama.model.flops import LLAMA_2_VOCAB_SIZE
from tinyllama.plan.estimate import Assumptions, Plan, estimate
from tinyllama.plan.system_info import CheckResult, Status, SystemInfo
from tinyllama.prepare.sources import list_files
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer

# The libraries of the optional stages take seconds to import.
# ruff: noqa: PLC0415


def check_recipe(recipe: Recipe, system: SystemInfo) -> list[CheckResult]:
    """Check everything that a recipe needs, and return the results."""
    vocab_size, findings = LLAMA_2_VOCAB_SIZE, dict[str, CheckResult]()
    try:
        tokenizer = Tokenizer.load(recipe.tokenizer)
    except InputError as problem:
        how_to_get = f"tinyllama tokenizer train {recipe.name}, or tinyllama tokenizer import TOKENIZER.MODEL "
        remedy = "" if Path(recipe.tokenizer).exists() else how_to_get + recipe.tokenizer
        first = _failed("tokenizer", problem, remedy)
    else:
        vocab_size = tokenizer.vocab_size
        first = _result("tokenizer", f"{recipe.tokenizer}: {vocab_size:,} tokens")
        findings = {
            finding.what: _failed(finding.what, finding.problem, status="missing" if finding.stops else "warning")
            for finding in preflight.findings(recipe, tokenizer)
        }
    store, store_result = _open_store(recipe)
    results = [first, store_result, *_check_data(recipe, store is not None), *_check_software(recipe, system)]
    # A finding of the preflight checks replaces the result of the same name.
    results = [*(findings.pop(result.what, result) for result in results), *findings.values()]
    results += _check_settings(recipe, system, store)
    return [*results, *check_sizes(recipe, vocab_size, system, disk_and_free_bytes)]


def _result(what: str, found: str, status: Status = "ok", remedy: str = "") -> CheckResult:
    return CheckResult("recipe", what, found, status, remedy)


def _failed(what: str, problem: InputError, remedy: str = "", status: Status = "missing") -> CheckResult:
    """Return the result of a failed check; the message of `problem` ends with `; remedy`."""
    message, _, own_remedy = str(problem).rpartition("; ")
    if not message:
        message, own_remedy = own_remedy, ""
    return _result(what, message, status, remedy or own_remedy)


def _run_check(what: str, found: str, check: Callable[[], object]) -> CheckResult:
    """Run a check; return a result with the text `found`, or with the problem if the check raises InputError."""
    try:
        check()
    except InputError as problem:
        return _failed(what, problem)
    return _result(what, found)


def _open_store(recipe: Recipe) -> tuple[TokenStore | None, CheckResult]:
    try:
        store = TokenStore.open(recipe.data.store)
    except InputError as problem:
        return None, _failed("token store", problem, f"tinyllama prepare {recipe.name}", "warning")
    tokens = sum(split.num_tokens for split in store.splits.values())
    return store, _result("token store", f"{recipe.data.store}: {tokens:,} tokens")


def _check_data(recipe: Recipe, has_store: bool) -> Iterator[CheckResult]:
    """Check the initial weights and, without a complete store, the raw files."""
    for name, source in recipe.data.sources.items():
        what = f"raw files of {name}"
        try:
            files = list_files(name, source)
            yield _result(what, f"{len(files):,} files, {format_bytes(sum(file.size for file in files))}")
        except InputError as problem:
            if has_store:
                yield _failed(what, problem, "needed only to prepare again", "warning")
            else:
                yield _failed(what, problem)
    if initial := recipe.train.initial_weights:
        if Path(initial).exists():
            yield _result("initial weights", initial)
        else:
            yield _result("initial weights", f"{initial}: no such folder; `train` will look on the hub", "warning")


def _check_software(recipe: Recipe, system: SystemInfo) -> Iterator[CheckResult]:
    from tinyllama.release.formats import check_format_libraries
    from tinyllama.tracking.trackers import check_trackers, enabled_trackers

    formats, trackers = recipe.release.formats, enabled_trackers(recipe.track)
    yield _run_check("release.formats", ", ".join(formats), lambda: check_format_libraries(formats))
    if recipe.release.tasks:
        yield from _check_tasks(recipe.release.tasks, system)
    yield _run_check("track", ", ".join(trackers) or "nothing", lambda: check_trackers(recipe.track))
    yield from _check_cleaning(recipe)
    yield _check_executor(recipe, system)
    if recipe.train.compile and not system.can_compile:
        problem = "no C++ compiler: training runs uncompiled"
        yield _result("train.compile", problem, "warning", "install g++ python3-dev")
    if recipe.train.float8:
        yield check_float8_support(system)
    if recipe.train.precision == "bf16" and not all(device.bf16 for device in system.devices):
        yield _result("train.precision", "bf16, which this GPU emulates", "warning", "--train.precision fp32")


def _check_tasks(tasks: tuple[str, ...], system: SystemInfo) -> Iterator[CheckResult]:
    from tinyllama.evaluate.evaluation import check_tasks

    result = _run_check("release.tasks", ", ".join(tasks), lambda: check_tasks(tasks))
    yield result
    if result.status != "ok":
        return
    if on_hub := [task for task in tasks if task not in system.offline_tasks]:
        remedy = 'a connection, or for most tasks pip install "tinyllama[offline]"'
        yield _result("items of the tasks", f"from the hub: {', '.join(on_hub)}", "warning", remedy)
    else:
        yield _result("items of the tasks", "installed")


def _check_cleaning(recipe: Recipe) -> Iterator[CheckResult]:
    steps = {name: source.clean for name, source in recipe.data.sources.items()}
    cleaned = [name for name, clean in steps.items() if clean.deduplicate or clean.filters or clean.decontaminate]
    if cleaned:
        from tinyllama.prepare.cleaning import check_cleaning

        yield _run_check("data.sources.*.clean", ", ".join(cleaned), lambda: check_cleaning(recipe))


def _check_executor(recipe: Recipe, system: SystemInfo) -> CheckResult:
    match recipe.data.executor:
        case "slurm" if shutil.which("sbatch") is None:
            return _result("data.executor", "slurm, but no sbatch", "missing", "prepare on a login node of the cluster")
        case "ray" if unmet := system.unmet.get("ray", ()):
            return _result("data.executor", ", ".join(unmet), "missing", 'pip install "tinyllama[ray]"')
    return _result("data.executor", recipe.data.executor)


def check_float8_support(system: SystemInfo) -> CheckResult:
    """Check that torchao is installed and every GPU supports float8 matrix products."""
    if unmet := system.unmet.get("float8", ()):
        return _result("train.float8", ", ".join(unmet), "missing", 'pip install "tinyllama[float8]"')
    if not system.devices or not all(device.float8 for device in system.devices):
        remedy = "remove it; GPUs from Ada and Hopper on support float8"
        return _result("train.float8", "no float8 matrix products on this machine", "missing", remedy)
    return _result("train.float8", "torchao, and GPUs with float8 matrix products")


def _check_settings(recipe: Recipe, system: SystemInfo, store: TokenStore | None) -> Iterator[CheckResult]:
    """Yield the warnings that `train` prints before its first step."""
    for line in preflight.recipe_warnings(recipe, len(system.devices) or 1, store):
        what, _, message = line.partition(": ")
        problem, _, remedy = message.rpartition("; ")
        yield _result(what, problem, "warning", remedy)


def check_sizes(
    recipe: Recipe, vocab_size: int, system: SystemInfo, free: Callable[[Path], tuple[int, int]]
) -> list[CheckResult]:
    """Check batch, memory and disks with the plan; `free` returns the device number and the free bytes of a path."""
    ranks, spec = len(system.devices) or 1, HARDWARE_SPECS["3090"]  # the speed does not matter here
    if system.devices:
        smallest = min(system.devices, key=lambda device: device.memory_bytes)
        spec = replace(spec_for_device(smallest.name) or spec, memory_bytes=smallest.memory_bytes)
    else:
        spec = replace(spec, name="cpu", memory_bytes=system.memory_bytes, is_cpu=True)
    try:
        plan = estimate(recipe, vocab_size, spec, Assumptions(gpus=ranks))
    except InputError as problem:
        return [_failed("batch", problem)]
    per_rank = f"{recipe.train.sequences_per_rank(ranks):,} sequences per rank" if ranks > 1 else "in one process"
    batch = _result("batch", f"{recipe.train.batch_sequences:,} sequences per step, {per_rank}")
    return [batch, _check_memory(plan), *_check_disks(recipe, plan, free)]


def _check_memory(plan: Plan) -> CheckResult:
    figures, where = plan.figures, "this machine" if plan.hardware.is_cpu else "one GPU"
    needed, available = format_bytes(figures["memory_bytes_per_gpu"]), format_bytes(plan.hardware.memory_bytes)
    found = f"{needed} of {where}'s {available}"
    if figures["memory_fits"]:
        return _result("memory", found)
    if largest := figures["largest_micro_batch_sequences"]:
        return _result("memory", found, "missing", f"--train.micro_batch_sequences {largest}")
    totals = figures["memory_bytes_by_activation_checkpointing"]
    choice = min(totals, key=lambda name: totals[name])
    if totals[choice] <= figures["usable_memory_bytes"]:
        return _result("memory", found, "missing", f"--parallel.activation_checkpointing {choice}")
    return _result("memory", found, "missing", f"more or larger GPUs: tinyllama plan {plan.recipe.name} --gpus 8")


def disk_and_free_bytes(path: Path) -> tuple[int, int]:
    """Return the device number and the free bytes of a path's disk; the path need not exist yet."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return existing.stat().st_dev, shutil.disk_usage(existing).free


def _check_disks(recipe: Recipe, plan: Plan, free: Callable[[Path], tuple[int, int]]) -> Iterator[CheckResult]:
    """Check each disk: yield a result on the data to be written and the free space."""
    run, store = RunDir.of_recipe(recipe), Path(recipe.data.store)
    run_bytes = plan.figures["checkpoints_bytes"] + plan.figures["releases_bytes"]
    run_bytes -= sum(disk_usage_bytes(path) for path in (run.checkpoints_dir, run.releases.path))
    store_bytes = plan.figures["store_bytes"] - disk_usage_bytes(store)
    if TokenStore.exists(store):
        store_bytes = 0
    disks: dict[int, list[tuple[Path, str, int]]] = {}
    for path, name, size in ((run.path, "checkpoints and releases", run_bytes), (store, "token store", store_bytes)):
        disks.setdefault(free(path)[0], []).append((path, name, max(0, size)))
    for parts in disks.values():
        path, total = parts[0][0], sum(size for _, _, size in parts)
        needed = ", ".join(f"{format_bytes(size)} for {name}" for _, name, size in parts if size) or "nothing more"
        available = free(path)[1]
        found = f"{needed}; {format_bytes(available)} free at {path.parent}/"
        if total <= available:
            yield _result("disk", found)
        else:
            yield _result("disk", found, "missing", f"free {format_bytes(total - available)}, or use another disk")
