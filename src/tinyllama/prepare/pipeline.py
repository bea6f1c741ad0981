"""Documents to a token store: plan the tasks, have an executor run what has no receipt yet, sign the manifests.

Reads the sources' files, writes the store. What is under way lies in STORE/.work: the plan, a receipt of each finished
task, the rejects so far. The store's own manifest is written last and makes it a store.
"""

import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tinyllama.data.store import WORK_DIR, TokenStore
from tinyllama.errors import InputError
from tinyllama.files import exclusive_lock, read_json, reject_symlinks, write_json
from tinyllama.formatting import echo
from tinyllama.prepare.executors import run_local, run_ray, submit_slurm
from tinyllama.prepare.files import find_modified_input
from tinyllama.prepare.manifests import differences, settings, settings_diff, write_manifests
from tinyllama.prepare.store_warnings import check_no_file_warnings
from tinyllama.prepare.tasks import TOKENS, Job, plan_job
from tinyllama.prepare.worker import load_tokenizer, stages, translate_write_errors
from tinyllama.progress import BYTES, poll_progress
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer


def prepare_store(recipe: Recipe, strict: bool = False) -> TokenStore | None:
    """Write the recipe's token store, going on where an interrupted run stopped, and open it.

    Returns None where the work went to Slurm, whose last job finishes the store.
    Raises InputError where a file cannot be read or written, a source has no documents, the store was made from other
    data; if `strict`, also where a file gives few documents or none, before the
    store counts as one.
    """
    store = Path(recipe.data.store)
    load_tokenizer.cache_clear()  # of a folder that another tokenizer has taken since
    tokenizer = load_tokenizer(recipe.tokenizer)
    job = plan_job(recipe)
    plan = {"settings": settings(recipe, tokenizer), "inputs": job.inputs}
    with exclusive_lock(store.parent, f"{store.name}.lock", f"{store}: another process is preparing this store"):
        if (store / "manifest.json").is_file():
            _check_existing_store(job, tokenizer)
            shutil.rmtree(job.work, ignore_errors=True)  # of a run that was killed after its last file
            if strict:
                check_no_file_warnings(str(store), read_json(store / "manifest.json"))
            return TokenStore.open(store)
        with translate_write_errors(store):
            _refuse_submitted(job)
            _initialize_work_dir(job, plan)
            _invalidate_changed_tasks(job)
            if recipe.data.executor == "slurm":
                _submit(job, plan, strict)
                return None
            _run(job)
            write_manifests(job, plan, strict)
    return TokenStore.open(store)


def _check_existing_store(job: Job, tokenizer: Tokenizer) -> None:
    store = job.store
    manifest = read_json(store / "manifest.json")
    for key, then, now in settings_diff(manifest, job.recipe, tokenizer):
        raise InputError(f"{store}: made with {key} {then}, the recipe says {now}; choose another store")
    if manifest["inputs"] != job.inputs:
        changed = sorted(dict(manifest["inputs"].items() ^ job.inputs.items()))[0]
        raise InputError(f"{store}: {changed} has changed, come or gone since it was made; choose another store")
    for split in TokenStore.open(store).splits.values():
        for shard in split.manifest["shards"]:
            if changed := find_modified_input(store / "manifest.json", shard["inputs"]):
                raise InputError(f"{store}: {changed} has changed since it was made; choose another store")


def _initialize_work_dir(job: Job, plan: dict[str, Any]) -> None:
    """Lay down the plan; keep what an interrupted run finished that is of this plan too, and clear away the rest."""
    store, work = job.store, job.work
    begun = read_json(work / "plan.json") if (work / "plan.json").is_file() else None
    if begun is None and not work.exists() and store.exists() and any(store.iterdir()):
        raise InputError(f"{store}: holds files but no token store; choose an empty or a new folder")
    reject_symlinks(store)
    if begun is None:
        shutil.rmtree(work, ignore_errors=True)
    elif found := next(differences(begun["settings"], plan["settings"]), None):
        key, then, now = found
        raise InputError(
            f"{store}: begun with {key} {then}, the recipe says {now}; choose another store, or delete this one and "
            "what it holds so far"
        )
    elif begun != plan:
        _prune_stale_tasks(job)
    if begun != plan:
        write_json(work / "plan.json", plan)
    for half_written in store.rglob("*.part"):
        half_written.unlink()


def _prune_stale_tasks(job: Job) -> None:
    """After inputs came, went or changed, keep the tasks that are the same; where documents are compared, none is."""
    ranks = () if len(stages(job)) > 1 else range(len(job.tasks))
    same = {job.completion_record(TOKENS, rank): rank for rank in ranks}
    kept, shards = 0, set()
    for path in sorted((job.work / "receipts").rglob("*.json")):
        receipt = read_json(path)
        if path not in same or receipt["task"] != job.identity(same[path]):
            path.unlink()
            continue
        kept += 1
        source = job.tasks[same[path]].source
        shards |= {job.store / source / split / shard["file"] for split, shard in receipt["shards"].items()}
    for path in job.store.glob("*/*/*"):
        if path.with_suffix(".tokens") not in shards and WORK_DIR not in path.parts:
            path.unlink()
    echo(f"{job.store}: inputs changed since it was begun: {kept} finished tasks are kept", to_stderr=True)


def _invalidate_changed_tasks(job: Job) -> None:
    """Have the tasks done again whose files have changed since an interrupted run did them.

    Where documents are compared with one another, a changed file may change what any task keeps: all are done again.
    """
    receipts = [path for stage in stages(job) for path in sorted((job.work / "receipts" / stage).glob("*.json"))]
    changed = [path for path in receipts if find_modified_input(path, read_json(path)["inputs"])]
    for path in receipts if changed and len(stages(job)) > 1 else changed:
        path.unlink()


def _run(job: Job) -> None:
    """Run each stage's pending tasks to the end, showing how far they are."""
    run = {"local": run_local, "ray": run_ray}[job.recipe.data.executor]
    for stage, tasks in stages(job).items():
        pending = job.unfinished(stage, range(tasks))
        if not pending:
            continue
        receipts = job.completion_record(stage, 0).parent
        receipts.mkdir(parents=True, exist_ok=True)
        label = "preparing" if stage == TOKENS else stage
        total, unit, done = _progress_source(job, stage, tasks)
        where = f"{tasks} tasks, {tasks - len(pending)} of them done before; the store is {job.store}"
        with poll_progress(label, total, unit, done, where=where) as begin:
            run(job, stage, pending, begin)


def _progress_source(job: Job, stage: str, tasks: int) -> tuple[int, str, Callable[[], int]]:
    """How much a stage has to do, its unit, and what counts how much is done.

    The tokens' tasks are measured by their files, as the plan has their sizes; what cleaning needs before, by tasks.
    """
    folder = job.completion_record(stage, 0).parent
    if stage != TOKENS:
        return tasks, "tasks", lambda: sum(1 for _ in folder.glob("*.json"))
    sizes = {
        job.completion_record(TOKENS, rank).name: sum(map(job.inputs.__getitem__, job.tasks[rank].files))
        for rank in range(tasks)
    }
    return sum(sizes.values()), BYTES, lambda: sum(sizes.get(path.name, 0) for path in folder.glob("*.json"))


def _submit(job: Job, plan: dict[str, Any], strict: bool) -> None:
    """Hand the pending tasks to Slurm and note the jobs' numbers, so that no second run does the same beside them."""
    pending = {stage: job.unfinished(stage, range(tasks)) for stage, tasks in stages(job).items()}
    numbers = submit_slurm(job, pending, partial(_finish_job, job, plan, strict))
    write_json(job.slurm / "submitted.json", numbers)


def _finish_job(job: Job, plan: dict[str, Any], strict: bool, data: Any, rank: int, world: int) -> None:
    """A datatrove step: the last Slurm job, which finds every task done."""
    write_manifests(job, plan, strict)


def _refuse_submitted(job: Job) -> None:
    """Refuse while Slurm still has jobs of this store, waiting or running."""
    if job.recipe.data.executor != "slurm" or not (job.slurm / "submitted.json").is_file():
        return
    numbers = ",".join(read_json(job.slurm / "submitted.json"))
    command = ["squeue", "--noheader", "--jobs", numbers]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # fails once they are forgotten
    except FileNotFoundError:
        raise InputError("data.executor: no squeue here; run this on a login node of the Slurm cluster") from None
    if found.returncode == 0 and found.stdout.strip():
        raise InputError(f"{job.store}: Slurm jobs {numbers} are still at it; wait for them, or scancel them first")
