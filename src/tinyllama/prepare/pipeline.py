"""Pipeline from raw text to a token store: plan the tasks, run unfinished tasks with an executor, write the manifests.

STORE/.work contains the unfinished work: the plan, a completion record of each finished task, and the rejected rows.
The manifests are made from the completion records. The store's own manifest is written last, so a
store with this manifest is complete.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tinyllama.data.store import FORMAT_VERSION, TokenStore
from tinyllama.errors import InputError
from tinyllama.files import (
    atomic_write,
    exclusive_lock,
    read_json,
    reject_symlink,
    sha256_of,
    write_json,
    write_json_with_sha256,
)
from tinyllama.formatting import echo
from tinyllama.prepare.block_lists import FINEWEB
from tinyllama.prepare.cleaning import check_cleaning
from tinyllama.prepare.decontamination import overlap, read_index
from tinyllama.prepare.executors import refuse_submitted, run_local, run_ray, submit_slurm
from tinyllama.prepare.files import find_modified_input
from tinyllama.prepare.store_warnings import MAX_LISTED_FILES, check_no_file_warnings, no_document_error
from tinyllama.prepare.tasks import TOKENS, Job, cached_tokenizer, plan_job, translate_write_errors
from tinyllama.progress import BYTES, poll_progress
from tinyllama.recipe import Cleaning, Recipe, differences
from tinyllama.tokenizer import Tokenizer

CompletionRecord = dict[str, Any]
_NEW_FIELDS = ("separator", "holdout", "url", "min_tokens")
_FIRST_CLEANING_FIELDS = ("deduplicate", "filters", "decontaminate", "decontamination_words", "language")
"""Fields that every manifest has, in this order."""
COMPARISON_VERSION = 2
"""Version of deduplication, decontamination and the filters: another version may drop other documents."""
_RESULTS = re.compile(
    r"tokenizer\.path$|comparison_version$|sources\.[^.]+\.(splits|contamination|skipped_files|suspect_files)\b"
)
"""Pattern of the dotted names of the manifest's fields that a finished store may have with any value."""


def build_store(recipe: Recipe, strict: bool = False) -> TokenStore | None:
    """Build the recipe's token store, or complete an interrupted store, and open the store.

    Returns None if Slurm runs the tasks; the last Slurm job then finishes the store. Raises InputError if a file is not
    readable or writable, if a source has no documents, or if the store was made from other data. If `strict`, also
    raises InputError if most rows of a file are rejected or no row is usable.
    """
    store = Path(recipe.data.store)
    if not store.name:
        raise InputError(f"data.store: {store} does not end in the name of a folder; choose another path")
    cached_tokenizer.cache_clear()  # the tokenizer in the folder may have changed
    tokenizer = cached_tokenizer(recipe.tokenizer)
    check_cleaning(recipe)
    job = plan_job(recipe)
    plan = {"settings": store_settings(recipe, tokenizer), "inputs": job.inputs}
    with exclusive_lock(store.with_name(f"{store.name}.lock"), f"{store}: another process is preparing this store"):
        if TokenStore.exists(store):
            _check_existing_store(job, tokenizer)
            with suppress(OSError):
                job.delete_work()  # from a run that was killed after its last file
            if strict:
                check_no_file_warnings(str(store), read_json(store / "manifest.json"))
            return TokenStore.open(store)
        with translate_write_errors(store):
            refuse_submitted(job)
            _initialize_work_dir(job, plan)
            if recipe.data.executor == "slurm":
                submit_slurm(job, partial(_finish_slurm_job, job, plan, strict))
                return None
            tokenizer.start_encoder()  # a warning about it appears before hours of work, and forked workers share it
            _run_stages(job)
            write_manifests(job, plan, strict)
    return TokenStore.open(store)


def _check_existing_store(job: Job, tokenizer: Tokenizer) -> None:
    """Raise InputError if the finished store was made with other settings or from other input files."""
    store = job.store
    manifest = read_json(store / "manifest.json")
    for key, (then, now) in settings_diff(manifest, job.recipe, tokenizer):
        raise InputError(f"{store}: made with {_difference(key, then, now)}; choose another store")
    if manifest["inputs"] != job.inputs:
        changed = min(dict(manifest["inputs"].items() ^ job.inputs.items()))
        problem = f"{changed} was changed, added or removed after this store was made"
        raise InputError(f"{store}: {problem}; restore the file, or choose another data.store")
    for split in TokenStore.open(store).splits.values():
        for shard in split.manifest["shards"]:
            if modified := find_modified_input(store / "manifest.json", shard["inputs"]):
                raise InputError(f"{store}: {modified} has changed since the store was made; choose another store")


def _difference(key: str, then: Any, now: Any) -> str:
    """Describe a setting that differs between a store and the recipe; hashes are shortened."""
    if key == "tokenizer.digest":
        return f"another tokenizer (sha256 {str(then)[:12]}, not {now[:12]})"
    if key == "comparison_version":
        return "another version of deduplication, decontamination and the filters"
    if key.startswith("block_lists."):
        return f"another content of {key.removeprefix('block_lists.')}"
    return f"{key} {then}, but the recipe has {now}"


def _initialize_work_dir(job: Job, plan: dict[str, Any]) -> None:
    """Write the plan; keep the results of an interrupted run that are still valid, and delete the others.

    Raises InputError if the folder has a symbolic link or a pipe, if it is not a store but has files, or if the
    unfinished work was begun with other settings or has files that `prepare` did not write.
    """
    store, path = job.store, job.work / "plan.json"
    if not job.work.exists() and store.exists() and any(store.iterdir()):
        raise InputError(f"{store}: has files but no token store; choose an empty or a new folder")
    for entry in store.rglob("*"):
        reject_symlink(entry)
        if entry.is_fifo():  # opening a pipe blocks
            raise InputError(f"{entry}: not a regular file; delete it")
    before = read_json(path) if path.is_file() else None
    for key, (then, now) in differences(before["settings"], plan["settings"]) if before is not None else ():
        raise InputError(
            f"{store}: begun with {_difference(key, then, now)}; choose another store, or delete this one "
            "with its unfinished work"
        )
    if foreign := job.find_foreign(store if before is None else job.work):
        raise InputError(f"{foreign}: not a file of this token store; move it, or choose an empty or a new folder")
    if before is None:
        job.delete_work()
    else:
        _delete_stale_results(job, before["inputs"] != plan["inputs"])
    if before != plan or not path.is_file():
        write_json(path, plan)
    job.delete_temp_files()


def _delete_stale_results(job: Job, has_other_inputs: bool) -> None:
    """Delete the results of tasks with changed inputs, or all results if documents are compared across tasks."""
    records = {path: read_json(path) for path in sorted((job.work / "completion_records").rglob("*.json"))}
    current = {job.completion_record(TOKENS, rank): job.fingerprint(rank) for rank in range(len(job.tasks))}
    stale = {
        path
        for path, record in records.items()
        if record.get("task") != current.get(path) or find_modified_input(path, record["inputs"])
    }
    if not (has_other_inputs or stale):
        return
    if job.cleaning:
        stale = set(records)
        job.delete_work()
    for path in stale:
        path.unlink(missing_ok=True)
    kept = {path: records[path]["shards"] for path in current.keys() & records.keys() - stale}
    shards = {
        job.store / task.source / split / shard["file"]
        for rank, task in enumerate(job.tasks)
        for split, shard in kept.get(job.completion_record(TOKENS, rank), {}).items()
    }
    for path in (path for source in job.recipe.data.sources for path in (job.store / source).glob("*/*")):
        if job.is_own(path) and path.with_suffix(".tokens") not in shards:
            path.unlink()
    echo(f"{job.store}: inputs changed during preparation; {len(kept)} finished tasks are kept", to_stderr=True)


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
        where = f"{tasks} tasks, {tasks - len(pending)} of them already finished; the store is {job.store}"
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


def store_settings(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings that, together with the inputs, determine the store's bytes; the manifest lists them."""
    cleanings = [source.clean for source in recipe.data.sources.values()]
    is_cleaned = any(cleaning.filters or cleaning.deduplicate or cleaning.decontaminate for cleaning in cleanings)
    block_lists = sorted({name for cleaning in cleanings for name in cleaning.url_block_lists} - {FINEWEB})
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
        "dtype": tokenizer.dtype.newbyteorder("<").str,
        **_recipe_settings(recipe),
        **({"comparison_version": COMPARISON_VERSION} if is_cleaned else {}),
        **({"block_lists": {name: sha256_of(Path(name)) for name in block_lists}} if block_lists else {}),
    }


def _recipe_settings(recipe: Recipe) -> dict[str, Any]:
    sources, unset = {}, Cleaning().model_dump(mode="json")
    for name, source in recipe.data.sources.items():
        fields = source.model_dump(mode="json", exclude={"path", "weight", "max_compression_ratio"})
        # Manifests of older stores lack some fields, so the default values of these fields are omitted.
        sources[name] = {key: fields[key] for key in fields if key not in _NEW_FIELDS or fields[key]}
        clean = fields["clean"]
        changed = {key: value for key, value in clean.items() if value != unset[key]}
        sources[name]["clean"] = {key: clean[key] for key in _FIRST_CLEANING_FIELDS} | changed
    return {
        "document": recipe.data.document.model_dump(),
        "validation_fraction": recipe.data.validation_fraction,
        "sources": sources,
    }


def settings_diff(
    manifest: dict[str, Any], recipe: Recipe, tokenizer: Tokenizer | None = None
) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the name and both values of each setting that differs between a store and a recipe.

    The tokenizer's settings are compared only if `tokenizer` is given.
    """
    wanted = store_settings(recipe, tokenizer) if tokenizer is not None else _recipe_settings(recipe)
    optional = {"comparison_version", "block_lists"} - manifest.keys()
    found = differences({key: manifest[key] for key in wanted if key not in optional}, wanted)
    return [(name, values) for name, values in found if not _RESULTS.match(name)]


def write_manifests(job: Job, plan: dict[str, Any], strict: bool = False) -> None:
    """Write the manifests, with the store's own manifest last, and delete the folder of unfinished work.

    Raises InputError if a source has no documents to train on, or if an input changed during preparation. If `strict`,
    also raises InputError if most rows of a file are rejected or no row is usable.
    """
    records = [read_json(job.completion_record(TOKENS, rank)) for rank in range(len(job.tasks))]
    _check_inputs_unchanged(job, records)
    settings = plan["settings"]
    tokenizer = {**settings["tokenizer"], "path": job.recipe.tokenizer}
    sources = {}
    for name, fields in settings["sources"].items():
        own = {rank: record for rank, record in enumerate(records) if job.tasks[rank].source == name}
        sources[name] = {**fields, **_write_source(job, name, own)}
    manifest = {**settings, "inputs": plan["inputs"], "tokenizer": tokenizer, "sources": sources}
    if strict:
        check_no_file_warnings(str(job.store), manifest)
    job.delete_temp_files()  # a worker may have been killed after another worker repeated its task
    write_json_with_sha256(job.store / "manifest.json", manifest)
    job.delete_work()


def _check_inputs_unchanged(job: Job, records: list[CompletionRecord]) -> None:
    """Raise InputError if an input has changed since a stage read it."""
    for rank, record in enumerate(records):
        if changed := find_modified_input(job.work / "plan.json", record["inputs"]):
            job.completion_record(TOKENS, rank).unlink()
            raise InputError(f"{changed}: changed while it was being prepared; run prepare again")
    hashes = {entry["path"]: entry["sha256"] for record in records for entry in record["inputs"]}
    for stage in job.cleaning:
        for path in (job.work / "completion_records" / stage.name).glob("*.json"):
            for entry in read_json(path)["inputs"]:
                if hashes.get(entry["path"], entry["sha256"]) != entry["sha256"]:
                    shutil.rmtree(job.work / "completion_records")
                    raise InputError(f"{entry['path']}: changed while it was being prepared; run prepare again")


def _write_source(job: Job, name: str, own: dict[int, CompletionRecord]) -> dict[str, Any]:
    """Write the manifests of a source's splits; return the source's results for the store's manifest."""
    splits = {}
    for split in ("train", "validation"):
        if entry := _write_split(job, job.store / name / split, own):
            splits[split] = entry
    warnings = [entry for record in own.values() for entry in record["warnings"]]
    if not splits.get("train", {}).get("documents"):
        reasons = _sum(record["dropped"] for record in own.values())
        raise no_document_error(name, reasons, f", see {warnings[0]['file']}" if warnings else "")
    outcomes: dict[str, Any] = {"splits": splits, "skipped_files": job.skipped_files[name]}
    if warnings:
        outcomes["suspect_files"] = {"count": len(warnings), "first": warnings[:MAX_LISTED_FILES]}
    cleaning = job.recipe.data.sources[name].clean
    if cleaning.decontaminate:
        dropped = [found for record in own.values() for found in record["contaminated"]]
        outcomes["contamination"] = overlap(read_index(job.work / "decontamination", cleaning), dropped)
    return outcomes


def _write_split(job: Job, folder: Path, own: dict[int, CompletionRecord]) -> dict[str, Any] | None:
    """Write one split's rejects and manifest; return its entry in the store's manifest, or None for an empty split."""
    split = folder.name
    shards = [_shard_entry(record, split) for record in own.values() if split in record["shards"]]
    read = {rank: record for rank, record in own.items() if job.tasks[rank].split == split}
    if not shards and not read:
        with suppress(OSError):
            folder.rmdir()  # an empty folder is not part of the store
        return None
    with atomic_write(folder / "rejects.jsonl") as file:
        for rank in read:
            with job.rejects_path(rank).open("rb") as part:
                shutil.copyfileobj(part, file)
    tokens, documents = (sum(shard[key] for shard in shards) for key in ("tokens", "documents"))
    subsets: dict[str, Counter[str]] = {}
    for record in own.values():
        for name, counts in record["subsets"].get(split, {}).items():
            subsets.setdefault(name, Counter()).update(counts)
    # A validation split that is taken from training files has no input files of its own. The number of its documents is
    # used as the number of rows read.
    rows: dict[str, Any] = {
        "read": sum(record["read"] for record in read.values()) or documents,
        "kept": documents,
        "dropped": dict(sorted(_sum(record["dropped"] for record in read.values()).items())),
    }
    if changed := _sum(record["changed"] for record in read.values()):
        rows["changed"] = dict(sorted(changed.items()))
    manifest = {
        "tokens": tokens,
        "documents": documents,
        "text_bytes": sum(counts["text_bytes"] for counts in subsets.values()),
        "subsets": dict(sorted(subsets.items())),
        "rows": rows,
        "rejects_sha256": sha256_of(folder / "rejects.jsonl"),
        "shards": shards,
    }
    write_json(folder / "manifest.json", manifest)
    return {"tokens": tokens, "documents": documents, "manifest_sha256": sha256_of(folder / "manifest.json")}


def _shard_entry(record: CompletionRecord, split: str) -> dict[str, Any]:
    """Return a shard's entry in the split's manifest, with the number of the shard's documents from each input."""
    inputs = [{**entry, "documents": entry["documents"].get(split, 0)} for entry in record["inputs"]]
    return {**record["shards"][split], "inputs": inputs}


def _sum(counts: Iterable[dict[str, int]]) -> Counter[str]:
    return sum(map(Counter, counts), Counter())  # the sum has no zero counts
