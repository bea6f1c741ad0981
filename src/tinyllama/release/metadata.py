"""The contents of release.json (a release's lineage from the raw files to the weights) and of releases.json.

A checkpoint contains the digests of its recipe, store and tokenizer. If the recipe, the store or the tokenizer has
changed since the checkpoint was written, the release is refused, because its card would describe a different model.
releases.json is computed from the releases and evaluations in the folder, so it can be recreated at any time.
"""

import math
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any

from tinyllama.data.order import num_validation_sequences
from tinyllama.data.store import num_sequences
from tinyllama.errors import InputError, translate_damage_errors
from tinyllama.evaluate.results import PUBLISHED_BASELINES, Score, task_score
from tinyllama.files import read_json, sha256_of
from tinyllama.model.flops import num_parameters
from tinyllama.plots.curves import summarize_metrics
from tinyllama.prepare.corpus import EMBEDDED_CORPUS_MANIFEST
from tinyllama.recipe import Recipe, Release, Source
from tinyllama.runs.run_dir import CheckpointDir, ReleaseDir, ReleasesDir, RunDir, batches_of
from tinyllama.runs.samples import SAMPLE_SETTINGS, current_samples
from tinyllama.tokenizer.backends import HUB_NAME

EMBEDDED_CORPUS = "embedded corpus"
PUBLIC_DATASETS = {"slimpajama": "cerebras/SlimPajama-627B", "starcoderdata": "bigcode/starcoderdata"}
"""Hub name of the public data set for each source format."""
SEVEN_TASKS = ("hellaswag", "openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq", "piqa")
"""Tasks whose mean is in TinyLlama's original model card."""

ReleaseRow = dict[str, Any]


def build_release_metadata(checkpoint: CheckpointDir, averaged: list[CheckpointDir], config: Release) -> dict[str, Any]:
    """Return the contents of release.json except `reference` and `files`; `averaged` lists the averaged checkpoints.

    Raises InputError if the recipe, the store or the tokenizer has changed since the checkpoint was written, or if
    metrics.jsonl or events.jsonl is damaged.
    """
    # The imports are local, because reports read releases without torch, which takes seconds to import.
    import torch  # noqa: PLC0415

    from tinyllama.loading import load_tokenizer  # noqa: PLC0415

    run, state, recipe = checkpoint.run, checkpoint.state(), Recipe.load(checkpoint.recipe_path)
    tokenizer, store_digest = load_tokenizer(checkpoint.path), sha256_of(run.store_manifest_path)
    for key, name, path, digest in (
        ("digest", "recipe", checkpoint.recipe_path, recipe.digest),
        ("store", "store manifest", run.store_manifest_path, store_digest),
        ("tokenizer", "tokenizer", checkpoint.tokenizer_dir, tokenizer.digest),
    ):
        if state[key] != digest:
            raise InputError(
                f"{path}: another {name} than the one {checkpoint.name} was trained with (sha256 {digest[:12]}, not "
                f"{state[key][:12]}); restore the original, or release a newer checkpoint"
            )
    vocab_size = state.get("vocab_size") or tokenizer.vocab_size  # external weights may have spare rows
    return {
        "name": recipe.name,
        "date": datetime.fromtimestamp(state["time"], UTC).date().isoformat(),
        "step": state["step"],
        "tokens": state["tokens"],
        "parameters": num_parameters(recipe.model, vocab_size),
        "initial_weights": state.get("initial_weights"),
        "hardware": state.get("hardware", []),
        "license": config.license,
        "skipped_batches": sorted(batches_of(run.rollbacks())),
        "formats": list(config.formats),
        "checkpoints": {one.name: one.commit_hash for one in averaged},
        "average_decay": config.average_decay,
        "recipe": {"digest": recipe.digest, "fields": recipe.model_dump(mode="json")},
        "tokenizer": {
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "bos": tokenizer.special_text(tokenizer.bos_id),
            "eos": tokenizer.special_text(tokenizer.eos_id),
        },
        "store": {"manifest_sha256": store_digest, **summarize_store(read_json(run.store_manifest_path), recipe)},
        "measured": _measured(run, state["step"], recipe),
        "samples": _last_samples(run, state["step"]),
        "versions": {
            "tinyllama": version("tinyllama"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def summarize_store(manifest: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the number and size of a store's `inputs`, and the origin and splits of each of the recipe's `sources`."""
    sources = {
        name: {"origin": _origin(source), "splits": manifest["sources"][name]["splits"]}
        for name, source in recipe.data.sources.items()
        if name in manifest["sources"]  # the recipe may have gained sources after the store was written
    }
    inputs = manifest["inputs"].values()
    return {"inputs": {"files": len(inputs), "bytes": sum(inputs)}, "sources": sources}


def _origin(source: Source) -> str | None:
    """Return the name of a source's data set; None for the user's own data, or if the files no longer exist."""
    path = Path(source.path)
    if any((folder / EMBEDDED_CORPUS_MANIFEST).is_file() for folder in (path, *path.parents)):
        return EMBEDDED_CORPUS
    return PUBLIC_DATASETS.get(source.format) if path.exists() else None


def _measured(run: RunDir, step: int, recipe: Recipe) -> dict[str, Any]:
    """Return the newest training loss and validation metrics up to `step`, and the duration of the steps in seconds.

    `validation_by_source` has the number of predicted `tokens`, the `loss` and the `bits_per_byte` of each source; runs
    of earlier versions lack them. `validation_by_position` has the `loss` and the `bits_per_byte` of each range of
    positions; it is empty for sequences of less than 512 tokens.

    Raises InputError if metrics.jsonl has no row up to `step`.
    """
    with translate_damage_errors(run.path):
        summary = summarize_metrics(run.metrics(step))
    if not summary.step:
        raise InputError(f"{run.metrics_path}: no row up to step {step} for the loss plot; restore the file")
    found: dict[str, Any] = {"loss": summary.newest.get("loss", (0, None))[1], "training_seconds": summary.seconds}
    if "validation_loss" in summary.newest:
        found["validation_step"] = summary.newest["validation_loss"][0]
        found |= {name: summary.newest[name][1] for name in ("validation_loss", "validation_bits_per_byte")}
        found["validation_by_source"] = {
            source: {"tokens": count * recipe.train.sequence_length}
            | {name: summary.newest[f"validation_{name}/{source}"][1] for name in ("loss", "bits_per_byte")}
            for source, count in _num_validation_sequences(run, recipe).items()
            if summary.newest.get(f"validation_bits_per_byte/{source}", (0,))[0] == found["validation_step"]
        }
        found["validation_by_position"] = {
            part: {
                name: summary.newest[f"validation_{name}_by_position/{part}"][1] for name in ("loss", "bits_per_byte")
            }
            for part in summary.positions
            if summary.newest[f"validation_bits_per_byte_by_position/{part}"][0] == found["validation_step"]
        }
    return found


def _num_validation_sequences(run: RunDir, recipe: Recipe) -> dict[str, int]:
    sources, length = read_json(run.store_manifest_path)["sources"], recipe.train.sequence_length
    splits = {name: source["splits"].get("validation", {"tokens": 0}) for name, source in sources.items()}
    return num_validation_sequences(
        recipe, {name: num_sequences(one["tokens"], length) for name, one in splits.items()}
    )


def _last_samples(run: RunDir, step: int) -> dict[str, Any] | None:
    """Return the `step` of the newest samples up to `step`, their `settings`, and the `texts`; None without samples."""
    samples = current_samples(run.events(), step)
    if not samples:
        return None
    newest = samples[-1]["step"]
    fields = ("prompt", "greedy", "sampled")
    texts = [{name: event.get(name) for name in fields} for event in samples if event["step"] == newest]
    return {"step": newest, "settings": SAMPLE_SETTINGS, "texts": texts}


def base_model(metadata: Mapping[str, Any]) -> str | None:
    """Return the hub name of the initial weights; None for a local folder or for weights drawn from the seed."""
    source = metadata["initial_weights"] and metadata["initial_weights"]["source"]
    return source if source and HUB_NAME.fullmatch(source) and not Path(source).exists() else None


def check_destination(release: ReleaseDir, force: bool) -> None:
    """Raise InputError if a release exists, or if `force` would delete files that no release wrote.

    A release's own files are the files in release.json and the files that an evaluation adds.
    """
    folder = release.path
    if not folder.exists() and not folder.is_symlink():
        return
    if release.exists and not force:
        remedy = f"check the release with `tinyllama verify {quote(str(folder))}`, or replace it with --force"
        raise InputError(f"{folder}: already released; {remedy} (in Python, force=True)")
    listed = release.metadata()["files"] if release.exists else ()
    own = {release.metadata_path.name, release.evaluation_path.name, *listed}
    paths = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    unexpected = [path for path in paths if path.relative_to(folder).as_posix() not in own]
    if release.exists and unexpected:
        raise InputError(f"{folder}: contains {unexpected[0].name!r}, which no release wrote; move it away")
    if folder.is_symlink() or not release.exists:
        raise InputError(f"{folder}: exists and is not a release; move it away")


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 of every file below `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def hash_file(path: Path) -> dict[str, Any]:
    """Return a file's entry in release.json, which has the file's size and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def releases_table(releases: ReleasesDir) -> dict[str, list[ReleaseRow]]:
    """Return the contents of releases.json: the rows of `releases` and the rows of `baselines`.

    Releases are sorted by number of tokens. Measured baselines come before published baselines. Each row has `name`,
    `tokens`, `hellaswag` (acc_norm) and `mean_of_seven` in per cent, and `source` (`measured` or `published, …`).
    `stderr` is None unless HellaSwag was measured. `coverage` describes the scored items. The row of a release also has
    `date`, `step`, `folder`, `commit` (SHA-256 of the newest averaged checkpoint's commit) and `complete`, which is
    true if the release and the recipe's baselines have all scores that the recipe requests.
    """
    rows = [_release_row(releases, release, metadata) for release, metadata in releases.releases()]
    measured = [
        {"name": evaluation["model"], "tokens": evaluation["tokens"], **_score_columns(evaluation)}
        for evaluation in releases.baseline_evaluations()
    ]
    published = [
        {
            "name": baseline.name,
            "tokens": baseline.tokens,
            "hellaswag": baseline.hellaswag_acc_norm,
            "stderr": None,
            "coverage": "all 10042 items",
            "mean_of_seven": baseline.mean_of_seven,
            "source": f"published, {baseline.source}",
        }
        for baseline in PUBLISHED_BASELINES
    ]
    return {"releases": sorted(rows, key=lambda row: row["tokens"]), "baselines": [*measured, *published]}


def _release_row(releases: ReleasesDir, release: ReleaseDir, metadata: Mapping[str, Any]) -> ReleaseRow:
    config: dict[str, Any] = metadata["recipe"]["fields"]["release"]
    run = RunDir(releases.path.resolve().parent)
    if run.recipe_path.is_file():  # the currently requested tasks, not the tasks at the time of the release
        config = run.recipe().release.model_dump(mode="json")
    evaluation = release.evaluation()
    evaluations = [evaluation, *map(releases.baseline_evaluation, config["baselines"])]
    return {
        **{key: metadata[key] for key in ("date", "name", "step", "tokens")},
        "folder": release.path.name,
        # the release's own checkpoint is the newest of the averaged checkpoints
        "commit": [*metadata["checkpoints"].values()][-1],
        "complete": all(covers_recipe(one, config) for one in evaluations),
        **_score_columns(evaluation),
    }


def _score_columns(evaluation: Mapping[str, Any] | None) -> ReleaseRow:
    rows = _zero_shot_rows(evaluation) if evaluation else {}
    score = task_score(rows.get("hellaswag", {}), "acc_norm")
    return {
        "hellaswag": None if score is None else score.value,
        "stderr": None if score is None else score.stderr,
        "coverage": evaluation["coverage"].get("hellaswag") if evaluation else None,
        "mean_of_seven": mean_of_seven(rows),
        "source": "measured" if rows.get("hellaswag") else None,
    }


def _zero_shot_rows(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the rows of an evaluation with zero-shot scores; only these can be compared with published scores."""
    num_fewshot = evaluation.get("num_fewshot", {})
    return {task: row for task, row in evaluation["rows"].items() if not num_fewshot.get(task)}


def mean_of_seven(rows: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return the mean of the model card's seven tasks in per cent; None unless all seven were scored."""
    scores = [score.value for task in SEVEN_TASKS if (score := task_score(rows.get(task, {})))]
    return sum(scores) / len(scores) if len(scores) == len(SEVEN_TASKS) else None


def covers_recipe(evaluation: Mapping[str, Any] | None, config: Mapping[str, Any]) -> bool:
    """Return whether an evaluation covers all tasks and items that `config`, a recipe's `release`, requests."""
    rows, requested = (_zero_shot_rows(evaluation), evaluation.get("asked", [])) if evaluation else ({}, [])
    limit = config["limit"] or math.inf
    too_few = {name for name, row in rows.items() if row["items"] < min(limit, row["total_items"])}
    return set(config["tasks"]) <= {*rows, *requested} - too_few


def release_score(row: Mapping[str, Any]) -> Score | None:
    """Return the HellaSwag score of a row of releases.json, or None if the row has no such score."""
    return None if row["hellaswag"] is None else Score("acc_norm", row["hellaswag"], row["stderr"])


def has_scores(table: Mapping[str, list[ReleaseRow]]) -> bool:
    """Return whether any release in releases.json has a HellaSwag score."""
    return any(row["hellaswag"] is not None for row in table["releases"])
