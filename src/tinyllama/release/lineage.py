"""Where a release comes from: the contents of release.json, from the raw files to the weights.

Reads a checkpoint and the run around it. The checkpoint names the recipe, the store and the tokenizer by
their digests; a run that now holds others is refused, because its card would tell of another model.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tinyllama.errors import InputError
from tinyllama.files import is_inside, read_json, sha256_of
from tinyllama.loading import load_tokenizer
from tinyllama.model.flops import num_parameters
from tinyllama.prepare.corpus import MANIFEST as EMBEDDED_CORPUS
from tinyllama.recipe import Recipe, Release, Source
from tinyllama.runs.checkpoint import COMMIT
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer.backends import HUB_NAME

EMBEDDED = "embedded corpus"
PUBLIC = {"slimpajama": "cerebras/SlimPajama-627B", "starcoderdata": "bigcode/starcoderdata"}


def build_release_metadata(checkpoint: Path, averaged: list[Path], wanted: Release) -> dict[str, Any]:
    """The contents of release.json, all but its `reference` and `files`; `averaged` are the checkpoints of its weights.

    Raises InputError where the run holds another store than trained the checkpoint.
    """
    run = checkpoint.parent.parent
    state, recipe = read_json(checkpoint / "state.json"), Recipe.load(checkpoint / "recipe.yaml")
    tokenizer = load_tokenizer(checkpoint)
    vocab_size = state.get("vocab_size") or tokenizer.vocab_size  # others' weights may have spare rows
    found = {"digest": recipe.digest, "store": sha256_of(run / "store.json"), "tokenizer": tokenizer.digest}
    _check_run_matches(checkpoint, state, found)
    return {
        "name": recipe.name,
        "date": datetime.fromtimestamp(state["time"], UTC).date().isoformat(),
        "step": state["step"],
        "tokens": state["tokens"],
        "parameters": num_parameters(recipe.model, vocab_size),
        "initial_weights": state.get("initial_weights"),
        "hardware": state.get("hardware", []),
        "skipped_batches": sorted(RunDir(run).skipped_batches()),
        "formats": list(wanted.formats),
        "checkpoints": {folder.name: sha256_of(folder / COMMIT) for folder in averaged},
        "average_decay": wanted.average_decay,
        "recipe": {"digest": recipe.digest, "fields": recipe.model_dump(mode="json")},
        "tokenizer": {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
        "store": {"manifest_sha256": found["store"], **store_facts(read_json(run / "store.json"), recipe)},
        "measured": _last_metrics(metrics_of_run(run, state["step"])),
        "versions": {
            "tinyllama": version("tinyllama"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def read_facts(release_folder: Path) -> dict[str, Any]:
    """The contents of a release's release.json. Raises InputError where the folder is no release."""
    path = release_folder / "release.json"
    facts = read_json(path) if path.is_file() else None
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
        found = "a release.json without its files" if path.is_file() else "no release.json"
        raise InputError(f"{release_folder}: no release here ({found}); `tinyllama release` makes one of a run")
    for name in facts["files"]:
        if not is_inside(name):
            raise InputError(f"{path}: names {name!r}, a file outside its folder; it is not as `release` wrote it")
    return facts


def metrics_of_run(run: Path, step: int) -> Iterator[dict[str, Any]]:
    """The run's rows of metrics up to a step, one at a time. Raises InputError where there is none."""
    path = run / "metrics.jsonl"
    rows = RunDir(run).metrics(step)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: no row up to step {step}; put the file back, the loss curve is drawn from it")
    return chain([first], rows)


def base_model(facts: Mapping[str, Any]) -> str | None:
    """The model on the hub whose weights the run began from, if any: a folder's name would say nothing there."""
    source = facts["initial_weights"] and facts["initial_weights"]["source"]
    return source if source and HUB_NAME.fullmatch(source) and not Path(source).exists() else None


def refuse_in_the_way(folder: Path, force: bool) -> None:
    """Raise InputError where a release cannot take this place: it is taken, or `force` would delete what is not ours.

    Ours are the files that release.json there names, and those that an evaluation adds.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    facts = read_json(folder / "release.json") if (folder / "release.json").is_file() else None
    if facts is not None and not force:
        raise InputError(f"{folder}: already released; --force replaces it")
    own = {"release.json", "evaluation.json", *(facts.get("files") or () if isinstance(facts, dict) else ())}
    found = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    others = [path for path in found if path.relative_to(folder).as_posix() not in own]
    if folder.is_symlink() or not folder.is_dir() or others or facts is None:
        is_release = facts is not None and others
        what = f"holds {others[0].name!r}, which no release wrote" if is_release else "in the way, and no release"
        raise InputError(f"{folder}: {what}; move it away")


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder`, by its path from there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def hash_file(path: Path) -> dict[str, Any]:
    """A file's entry in release.json."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _check_run_matches(checkpoint: Path, state: dict[str, Any], found: dict[str, str]) -> None:
    run = checkpoint.parent.parent
    files = {"digest": checkpoint / "recipe.yaml", "store": run / "store.json", "tokenizer": checkpoint / "tokenizer"}
    for key, path in files.items():
        if state[key] != found[key]:
            raise InputError(
                f"{path}: digest {found[key][:12]}, but {checkpoint.name} was "
                f"trained with {state[key][:12]}; put that one back, or release a newer checkpoint"
            )


def store_facts(manifest: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What release.json says of a store: its `inputs`, and of each of the recipe's `sources` its origin and splits."""
    sources = {
        name: {"origin": _origin(source), "splits": manifest["sources"][name]["splits"]}
        for name, source in recipe.data.sources.items()
        if name in manifest["sources"]  # a recipe that was changed since may name others
    }
    inputs = manifest["inputs"].values()
    return {"inputs": {"files": len(inputs), "bytes": sum(inputs)}, "sources": sources}


def _origin(source: Source) -> str | None:
    """Which known data a source is; None for the user's own, and where its files are not there to tell."""
    path = Path(source.path)
    if any((folder / EMBEDDED_CORPUS).is_file() for folder in (path, *path.parents)):
        return EMBEDDED
    return PUBLIC.get(source.format) if path.exists() else None


def _last_metrics(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The last training loss and the last validation, which may be some steps older than the weights."""
    found: dict[str, Any] = {"loss": None}
    for row in rows:
        if row["loss"] is not None:
            found["loss"] = row["loss"]
        if row.get("validation_loss") is not None:
            found["validation_step"] = row["step"]
            found |= {name: row[name] for name in ("validation_loss", "validation_bits_per_byte")}
    return found
