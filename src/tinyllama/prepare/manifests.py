"""From the tasks' receipts to the store's manifests: what was read, kept, left out and why, with every hash.

Reads STORE/.work, writes the splits' manifests and lists of rejects, then the store's own, which makes it a store.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyllama.data.store import FORMAT_VERSION
from tinyllama.errors import InputError
from tinyllama.files import atomic_write, read_json, sha256_of, write_json, write_json_with_sha256
from tinyllama.prepare import cleaning
from tinyllama.prepare.files import find_modified_input
from tinyllama.prepare.store_warnings import MAX_LISTED_FILES, check_no_file_warnings, rejection_remedy
from tinyllama.prepare.tasks import TOKENS, Job
from tinyllama.prepare.worker import stages
from tinyllama.recipe import Recipe, flatten
from tinyllama.tokenizer import Tokenizer

Receipt = dict[str, Any]
_OUTCOMES = ("splits", "contamination", "files_left_out", "files_in_doubt")
"""What stands beside a source's settings in the store's manifest."""


def settings(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the bytes depend on besides the inputs, as it stands in the manifest."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
        "dtype": tokenizer.dtype.newbyteorder("<").str,
        **_recipe_settings(recipe),
    }


def _recipe_settings(recipe: Recipe) -> dict[str, Any]:
    sources = {
        name: {key: value for key, value in source.model_dump(mode="json").items() if _is_setting(key, value)}
        for name, source in recipe.data.sources.items()
    }
    return {
        "document": recipe.data.document.model_dump(),
        "validation_fraction": recipe.data.validation_fraction,
        "sources": sources,
    }


def _is_setting(key: str, value: Any) -> bool:
    """Whether a source's field belongs to its settings; fields that older stores lack, only where they are set."""
    if key in ("separator", "holdout"):
        return value is not None
    return key not in ("path", "weight", "max_compression_ratio")


def settings_diff(
    manifest: dict[str, Any], recipe: Recipe, tokenizer: Tokenizer | None = None
) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of each setting in which a store and a recipe differ; the tokenizer's only where given."""
    wanted = settings(recipe, tokenizer) if tokenizer else _recipe_settings(recipe)
    found = {key: manifest[key] for key in wanted}
    found["sources"] = {
        name: {key: value for key, value in fields.items() if key not in _OUTCOMES}
        for name, fields in found["sources"].items()
    }
    if "tokenizer" in found:
        found["tokenizer"] = {key: found["tokenizer"][key] for key in wanted["tokenizer"]}
    return differences(found, wanted)


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values of each leaf in which two mappings differ, in the order of the names."""
    then, now = flatten(found), flatten(wanted)
    for key in sorted(then | now):
        if then.get(key) != now.get(key):
            yield key, then.get(key), now.get(key)


def write_manifests(job: Job, plan: dict[str, Any], strict: bool = False) -> None:
    """Write the manifests, the store's own last of all, and clear the work away.

    Raises InputError where a source has nothing to train on, or a file changed while it was being read; if `strict`,
    also where a file gives few documents or none.
    """
    receipts = [read_json(job.completion_record(TOKENS, rank)) for rank in range(len(job.tasks))]
    _check_inputs_unchanged(job, receipts)
    settings = plan["settings"]
    tokenizer = {**settings["tokenizer"], "path": job.recipe.tokenizer}
    sources = {}
    for name, fields in settings["sources"].items():
        own = {rank: receipt for rank, receipt in enumerate(receipts) if job.tasks[rank].source == name}
        sources[name] = {**fields, **_finish_source(job, name, own)}
    manifest = {**settings, "inputs": plan["inputs"], "tokenizer": tokenizer, "sources": sources}
    if strict:
        check_no_file_warnings(str(job.store), manifest)
    for part in job.store.rglob("*.part"):  # of a killed worker that was not yet gone when its task was done again
        part.unlink(missing_ok=True)
    write_json_with_sha256(job.store / "manifest.json", manifest)
    shutil.rmtree(job.work)


def _check_inputs_unchanged(job: Job, receipts: list[Receipt]) -> None:
    """Every stage must have read the bytes that are there still: the manifest vouches for them."""
    for rank, receipt in enumerate(receipts):
        if changed := find_modified_input(job.work / "plan.json", receipt["inputs"]):
            job.completion_record(TOKENS, rank).unlink()
            raise InputError(f"{changed}: changed while it was being prepared; run prepare again")
    for stage in stages(job).keys() - {TOKENS}:
        for rank, receipt in enumerate(receipts):
            path, now = job.completion_record(stage, rank), _hashes(receipt)
            for file, then in _hashes(read_json(path)).items() if path.is_file() else ():
                if now.get(file, then) != then:
                    shutil.rmtree(job.work / "receipts")
                    raise InputError(f"{file}: changed while it was being prepared; run prepare again")


def _hashes(receipt: Receipt) -> dict[str, str]:
    """SHA-256 of each input that a receipt vouches for, by path."""
    return {entry["path"]: entry["sha256"] for entry in receipt["inputs"]}


def _finish_source(job: Job, name: str, own: dict[int, Receipt]) -> dict[str, Any]:
    """Write the manifests of a source's splits; return what stands beside its settings in the store's."""
    splits = {
        split: entry
        for split in ("train", "validation")
        if (entry := _finish_split(job, job.store / name / split, own))
    }
    doubts = [entry for receipt in own.values() for entry in receipt.get("doubts", ())]
    if not splits.get("train", {}).get("documents"):
        reasons = _sum(receipt["left_out"] for receipt in own.values())
        place = f", see {doubts[0]['file']}" if doubts else ""
        raise InputError(
            f"data.sources.{name}: no document left to train on ({_format_reasons(reasons)}){place}; "
            f"{rejection_remedy(reasons)}"
        )
    outcome: dict[str, Any] = {"splits": splits, "files_left_out": job.left_out[name]}
    if doubts:
        outcome["files_in_doubt"] = {"count": len(doubts), "first": doubts[:MAX_LISTED_FILES]}
    if job.recipe.data.sources[name].clean.decontaminate:
        dropped = [found for receipt in own.values() for found in receipt["contaminated"]]
        outcome["contamination"] = cleaning.overlap(job.work, name, dropped)
    return outcome


def _finish_split(job: Job, folder: Path, own: dict[int, Receipt]) -> dict[str, Any] | None:
    """Write one split's rejects and manifest; return its entry in the store's, None where it is empty."""
    split = folder.name
    shards = [_shard(receipt, split) for receipt in own.values() if split in receipt["shards"]]
    read = {rank: receipt for rank, receipt in own.items() if job.tasks[rank].split == split}
    if not shards and not read:
        with suppress(OSError):
            folder.rmdir()  # a holdout that took no document has left it empty, and it is no part of the store
        return None
    with atomic_write(folder / "rejects.jsonl") as file:
        for rank in read:
            with job.rejects_path(rank).open("rb") as part:
                shutil.copyfileobj(part, file)
    tokens, documents = (sum(shard[key] for shard in shards) for key in ("tokens", "documents"))
    changed = _sum(receipt.get("changed", {}) for receipt in read.values())
    subsets = _subsets(receipt["subsets"].get(split, {}) for receipt in own.values())
    manifest = {
        "tokens": tokens,
        "documents": documents,
        "text_bytes": sum(tally["text_bytes"] for tally in subsets.values()),
        "subsets": subsets,
        # A validation split cut from the training files has read the documents that it holds, and no others.
        "rows": {
            "read": sum(receipt["read"] for receipt in read.values()) or documents,
            "kept": documents,
            "left_out": dict(sorted(_sum(receipt["left_out"] for receipt in read.values()).items())),
            **({"changed": dict(sorted(changed.items()))} if changed else {}),
        },
        "rejects_sha256": sha256_of(folder / "rejects.jsonl"),
        "shards": shards,
    }
    write_json(folder / "manifest.json", manifest)
    return {"tokens": tokens, "documents": documents, "manifest_sha256": sha256_of(folder / "manifest.json")}


def _shard(receipt: Receipt, split: str) -> dict[str, Any]:
    """A shard's entry, with its inputs and how many of its documents came from each."""
    inputs = [{**entry, "documents": entry["documents"].get(split, 0)} for entry in receipt["inputs"]]
    return {**receipt["shards"][split], "inputs": inputs}


def _subsets(parts: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, Counter[str]] = {}
    for part in parts:
        for name, tally in part.items():
            total.setdefault(name, Counter()).update(tally)
    return {name: dict(total[name]) for name in sorted(total)}


def _sum(counts: Iterable[dict[str, int]]) -> Counter[str]:
    return sum(map(Counter, counts), Counter())  # which leaves out what is nought


def _format_reasons(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} rows {reason}" for reason, count in reasons.items()) or "no rows at all"
