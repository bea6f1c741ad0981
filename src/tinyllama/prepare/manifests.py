"""Manifests of a store: counts and hashes of inputs, shards and dropped rows, from the tasks' completion records.

This module reads STORE/.work. It writes the splits' manifests and lists of rejected rows. Then it writes the store's
manifest, which makes the folder a store.
"""

import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyllama.data.store import FORMAT_VERSION
from tinyllama.errors import InputError
from tinyllama.files import atomic_write, read_json, sha256_of, write_json, write_json_with_sha256
from tinyllama.prepare.decontamination import overlap, read_index
from tinyllama.prepare.files import find_modified_input
from tinyllama.prepare.store_warnings import MAX_LISTED_FILES, check_no_file_warnings, rejection_remedy
from tinyllama.prepare.tasks import TOKENS, Job
from tinyllama.recipe import Recipe, differences
from tinyllama.tokenizer import Tokenizer

CompletionRecord = dict[str, Any]
_OUTCOMES = ("splits", "contamination", "skipped_files", "suspect_files")
"""Fields of a source in the store's manifest that are results of `prepare` and not settings."""


def store_settings(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings that, together with the inputs, determine the store's bytes, in the manifest's form."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
        "dtype": tokenizer.dtype.newbyteorder("<").str,
        **_recipe_settings(recipe),
    }


def _recipe_settings(recipe: Recipe) -> dict[str, Any]:
    sources = {}
    for name, source in recipe.data.sources.items():
        fields = source.model_dump(mode="json", exclude={"path", "weight", "max_compression_ratio"})
        # Manifests of older stores lack separator and holdout, so empty values of these two fields are omitted.
        sources[name] = {key: fields[key] for key in fields if key not in ("separator", "holdout") or fields[key]}
    return {
        "document": recipe.data.document.model_dump(),
        "validation_fraction": recipe.data.validation_fraction,
        "sources": sources,
    }


def settings_diff(
    manifest: dict[str, Any], recipe: Recipe, tokenizer: Tokenizer | None = None
) -> list[tuple[str, tuple[Any, Any]]]:
    """Return the name and both values of each setting that differs between a store and a recipe.

    The tokenizer's settings are compared only if `tokenizer` is given.
    """
    wanted = store_settings(recipe, tokenizer) if tokenizer else _recipe_settings(recipe)
    found = {key: manifest[key] for key in wanted}
    found["sources"] = {
        name: {key: value for key, value in fields.items() if key not in _OUTCOMES}
        for name, fields in found["sources"].items()
    }
    if "tokenizer" in found:
        found["tokenizer"] = {key: found["tokenizer"][key] for key in wanted["tokenizer"]}
    return differences(found, wanted)


def write_manifests(job: Job, plan: dict[str, Any], strict: bool = False) -> None:
    """Write the manifests, with the store's own manifest last, and delete the folder of unfinished work.

    Raises InputError if a source has no documents to train on, or if a file changed during the work. If `strict`,
    raises InputError also if most rows of a file are rejected or no row is usable.
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
    for part in job.store.rglob("*.part"):  # from a killed worker that ended after another worker repeated its task
        part.unlink(missing_ok=True)
    write_json_with_sha256(job.store / "manifest.json", manifest)
    shutil.rmtree(job.work)


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
    """Write the manifests of a source's splits; return the source's outcomes for the store's manifest."""
    splits = {}
    for split in ("train", "validation"):
        if entry := _write_split(job, job.store / name / split, own):
            splits[split] = entry
    warnings = [entry for record in own.values() for entry in record.get("warnings", ())]
    if not splits.get("train", {}).get("documents"):
        reasons = _sum(record["dropped"] for record in own.values())
        counts = ", ".join(f"{count} rows {reason}" for reason, count in reasons.items()) or "no rows at all"
        place = f", see {warnings[0]['file']}" if warnings else ""
        raise InputError(
            f"data.sources.{name}: no document left to train on ({counts}){place}; {rejection_remedy(reasons)}"
        )
    outcomes: dict[str, Any] = {"splits": splits, "skipped_files": job.skipped_files[name]}
    if warnings:
        outcomes["suspect_files"] = {"count": len(warnings), "first": warnings[:MAX_LISTED_FILES]}
    if job.recipe.data.sources[name].clean.decontaminate:
        dropped = [found for record in own.values() for found in record["contaminated"]]
        outcomes["contamination"] = overlap(read_index(job.work / "decontamination", name), dropped)
    return outcomes


def _write_split(job: Job, folder: Path, own: dict[int, CompletionRecord]) -> dict[str, Any] | None:
    """Write one split's rejects and manifest; return its entry in the store's manifest, None for an empty split."""
    split = folder.name
    shards = [_shard_entry(record, split) for record in own.values() if split in record["shards"]]
    read = {rank: record for rank, record in own.items() if job.tasks[rank].split == split}
    if not shards and not read:
        with suppress(OSError):
            folder.rmdir()  # if no document is in the split, its empty folder is not part of the store
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
    # For a validation split from training files, the rows that were read are exactly the documents in the split.
    rows: dict[str, Any] = {
        "read": sum(record["read"] for record in read.values()) or documents,
        "kept": documents,
        "dropped": dict(sorted(_sum(record["dropped"] for record in read.values()).items())),
    }
    if changed := _sum(record.get("changed", {}) for record in read.values()):
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
    return sum(map(Counter, counts), Counter())  # without zero counts
