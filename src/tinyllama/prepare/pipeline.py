"""Pipeline from raw text to a token store: plan the tasks, run unfinished tasks with an executor, write the manifests.

The pipeline reads the sources' files and writes the store. STORE/.work contains the unfinished work: the plan, a
completion record of each finished task, and the rejected rows. The store's own manifest is written last and makes the
folder a store.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tinyllama.data.store import WORK_DIR, TokenStore
from tinyllama.errors import InputError
from tinyllama.files import exclusive_lock, read_json, reject_symlinks, write_json
from tinyllama.formatting import echo
from tinyllama.prepare.cleaning import check_cleaning
from tinyllama.prepare.executors import refuse_submitted, run_local, run_ray, submit_slurm
from tinyllama.prepare.files import find_modified_input
from tinyllama.prepare.manifests import settings_diff, store_settings, write_manifests
from tinyllama.prepare.store_warnings import check_no_file_warnings
from tinyllama.prepare.tasks import TOKENS, Job, plan_job
from tinyllama.prepare.worker import cached_tokenizer, translate_write_errors
from tinyllama.progress import BYTES, poll_progress
from tinyllama.recipe import Recipe, differences
from tinyllama.tokenizer import Tokenizer


def build_store(recipe: Recipe, strict: bool = False) -> TokenStore | None:
    """Write the recipe's token store, or complete an interrupted store, and open the store.

    Returns None if Slurm runs the tasks; its last job then finishes the store. Raises InputError if a file is not
    readable or writable, if a source has no documents, or if the store was made from other data. If `strict`, raises
    InputError also if most rows of a file are rejected or no row is usable.
    """
    store = Path(recipe.data.store)
    cached_tokenizer.cache_clear()  # the folder may now have another tokenizer
    tokenizer = cached_tokenizer(recipe.tokenizer)
    check_cleaning(recipe)
    job = plan_job(recipe)
    plan = {"settings": store_settings(recipe, tokenizer), "inputs": job.inputs}
    with exclusive_lock(store.with_name(f"{store.name}.lock"), f"{store}: another process is preparing this store"):
        if TokenStore.exists(store):
            _check_existing_store(job, tokenizer)
            shutil.rmtree(job.work, ignore_errors=True)  # from a run that was killed after its last file
            if strict:
                check_no_file_warnings(str(store), read_json(store / "manifest.json"))
            return TokenStore.open(store)
        with translate_write_errors(store):
            refuse_submitted(job)
            _initialize_work_dir(job, plan)
            if recipe.data.executor == "slurm":
                submit_slurm(job, partial(_finish_slurm_job, job, plan, strict))
                return None
            _run_stages(job)
            write_manifests(job, plan, strict)
    return TokenStore.open(store)


def _check_existing_store(job: Job, tokenizer: Tokenizer) -> None:
    """Raise InputError if the finished store was made with other settings or from other input files."""
    store = job.store
    manifest = read_json(store / "manifest.json")
    for key, (then, now) in settings_diff(manifest, job.recipe, tokenizer):
        raise InputError(f"{store}: made with {key} {then}, the recipe has {now}; choose another store")
    if manifest["inputs"] != job.inputs:
        changed = min(dict(manifest["inputs"].items() ^ job.inputs.items()))
        raise InputError(f"{store}: {changed} was changed, added or removed since it was made; choose another store")
    for split in TokenStore.open(store).splits.values():
        for shard in split.manifest["shards"]:
            if modified := find_modified_input(store / "manifest.json", shard["inputs"]):
                raise InputError(f"{store}: {modified} has changed since it was made; choose another store")


def _initialize_work_dir(job: Job, plan: dict[str, Any]) -> None:
    """Write the plan; keep finished tasks of an interrupted run that are also in this plan, and delete the others."""
    store, work = job.store, job.work
    before = read_json(work / "plan.json") if (work / "plan.json").is_file() else None
    if before is None and not work.exists() and store.exists() and any(store.iterdir()):
        raise InputError(f"{store}: has files but no token store; choose an empty or a new folder")
    reject_symlinks(store)
    if before is None:
        shutil.rmtree(work, ignore_errors=True)
    else:
        for key, (then, now) in differences(before["settings"], plan["settings"]):
            raise InputError(
                f"{store}: begun with {key} {then}, the recipe has {now}; choose another store, or delete this one "
                "with its unfinished work"
            )
        if before != plan:
            _delete_stale_tasks(job)
    if before != plan:
        write_json(work / "plan.json", plan)
    for path in store.rglob("*.part"):
        path.unlink()
    # Tasks with changed files are repeated. If documents are compared across tasks, all tasks are then repeated.
    records = sorted((work / "completion_records").rglob("*.json"))
    modified = [path for path in records if find_modified_input(path, read_json(path)["inputs"])]
    for path in records if modified and job.cleaning else modified:
        path.unlink()


def _delete_stale_tasks(job: Job) -> None:
    """Delete the results of an interrupted run, except the results of tasks that are unchanged in the new plan.

    If documents are compared across tasks, the results of all tasks are deleted.
    """
    kept: dict[Path, int] = {}
    if job.cleaning:
        shutil.rmtree(job.work)
    else:
        ranks = {job.completion_record(TOKENS, rank): rank for rank in range(len(job.tasks))}
        for path in (job.work / "completion_records").rglob("*.json"):
            if path in ranks and read_json(path)["task"] == job.fingerprint(ranks[path]):
                kept[path] = ranks[path]
            else:
                path.unlink()
    shards = {
        job.store / job.tasks[rank].source / split / shard["file"]
        for path, rank in kept.items()
        for split, shard in read_json(path)["shards"].items()
    }
    for path in job.store.glob("*/*/*"):
        if path.with_suffix(".tokens") not in shards and WORK_DIR not in path.parts:
            path.unlink()
    echo(f"{job.store}: inputs changed since it was begun: {len(kept)} finished tasks are kept", to_stderr=True)


def _run_stages(job: Job) -> None:
    """Run each stage's unfinished tasks, with a progress bar."""
    run = {"local": run_local, "ray": run_ray}[job.recipe.data.executor]
    for stage, tasks in job.stages.items():
        pending = job.unfinished(stage)
        if not pending:
            continue
        job.completion_record(stage, 0).parent.mkdir(parents=True, exist_ok=True)
        label = "preparing" if stage == TOKENS else stage
        total, unit, done = _progress_source(job, stage)
        where = f"{tasks} tasks, {tasks - len(pending)} of them done before; the store is {job.store}"
        with poll_progress(label, total, unit, done, where=where) as started:
            run(job, stage, pending, started)


def _progress_source(job: Job, stage: str) -> tuple[int, str, Callable[[], int]]:
    """Return the total work of a stage, its unit, and a function that counts the finished work.

    The unit is bytes of input files for the stage that writes tokens, and tasks for the other stages.
    """
    folder = job.completion_record(stage, 0).parent
    if stage != TOKENS:
        return job.stages[stage], "tasks", lambda: sum(1 for _ in folder.glob("*.json"))
    sizes = {
        job.completion_record(TOKENS, rank).name: sum(job.inputs[file] for file in task.files)
        for rank, task in enumerate(job.tasks)
    }
    return sum(sizes.values()), BYTES, lambda: sum(sizes.get(path.name, 0) for path in folder.glob("*.json"))


def _finish_slurm_job(job: Job, plan: dict[str, Any], strict: bool, data: Any, rank: int, world_size: int) -> None:
    """Write the manifests, as a step of a datatrove pipeline in the last Slurm job, after all tasks."""
    write_manifests(job, plan, strict)
