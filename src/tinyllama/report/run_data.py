"""The content of a report: all data in a run's folder except its weights, read once.

Only the recipe must exist. Data that does not exist yet, or was deleted, is empty or None.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError
from tinyllama.files import read_json, sha256_of
from tinyllama.hardware import format_hardware
from tinyllama.model.flops import num_parameters
from tinyllama.plots.curves import METRICS, MetricsSummary, summarize_metrics
from tinyllama.recipe import Recipe
from tinyllama.release.metadata import releases_table, summarize_store
from tinyllama.runs.listing import RunStatus, read_run_status
from tinyllama.runs.run_dir import RunDir

Json = Mapping[str, Any]


@dataclass(frozen=True)
class RunData:
    """Content of a run's folder at one time."""

    folder: Path
    recipe: Recipe
    read_at: float
    """Time at which the folder was read, in seconds since 1970."""
    state: RunStatus
    metrics: MetricsSummary
    events: list[Json]
    """Events, oldest first."""
    store: Json | None
    """`inputs` and `sources`, in the form that release.json has; None before training has started."""
    digests: Mapping[str, str]
    """SHA-256 of recipe, token store and tokenizer."""
    parameters: int | None
    """Number of parameters; None before the vocabulary size is known."""
    checkpoint: Json
    """State of the newest checkpoint; empty without a checkpoint."""
    releases: list[tuple[str, Json]]
    """Folder name and metadata of each release, in the order of their steps."""
    evaluations: list[tuple[str, Json]]
    """Label, such as `release, step 100`, and content of each evaluation of a release or a checkpoint."""
    scores: Mapping[str, list[dict[str, Any]]]
    """Result of `releases_table` for the run."""

    @property
    def name(self) -> str:
        """Name of the folder, which differs between runs of the same recipe."""
        return self.folder.resolve().name

    @property
    def ranks(self) -> list[int]:
        """Distinct world sizes of the run's starts, in order."""
        return list(dict.fromkeys(event["ranks"] for event in self.events if event.get("ranks")))

    @property
    def hardware(self) -> str | None:
        """Hardware that the run trained on; None before the first checkpoint."""
        states = [self.checkpoint, *(metadata for _, metadata in reversed(self.releases))]
        records: list[Json] = next((state["hardware"] for state in states if state.get("hardware")), [])
        return "; then ".join(map(format_hardware, records)) or None

    @property
    def wall_clock_seconds(self) -> float | None:
        """Seconds from the first event to the last event; None without events.

        While the run is training, the newest row of the metrics is the end if it is later than the last event.
        """
        if not self.events:
            return None
        start, end = (float(self.events[place]["time"]) for place in (0, -1))
        if self.state.state == "running" and self.state.row_age_seconds is not None:
            end = max(end, self.read_at - self.state.row_age_seconds)
        return max(0.0, end - start)


def read_run(folder: Path) -> RunData:
    """Read a run. Raises InputError if the folder is not a run, or if one of its files is damaged."""
    run, now = RunDir.open(folder), time.time()
    recipe, newest, releases = run.recipe(), run.newest_checkpoint(), run.releases.releases()
    manifest = read_json(run.store_manifest_path) if run.store_manifest_path.is_file() else None
    checkpoint = newest.state() if newest else {}
    evaluated = [("release", release.evaluation()) for release, _ in releases]
    evaluated += [
        ("checkpoint", read_json(found.evaluation_path))
        for found in run.checkpoints()
        if found.evaluation_path.is_file()
    ]
    digests, store, vocab_size = {"recipe": recipe.digest}, None, checkpoint.get("vocab_size")
    if manifest:
        digests["token store, its manifest"] = sha256_of(run.store_manifest_path)
        digests["tokenizer"] = checkpoint.get("tokenizer") or manifest["tokenizer"]["digest"]
        vocab_size = vocab_size or manifest["tokenizer"]["vocab_size"]
        store = _with_origins(summarize_store(manifest, recipe), [metadata for _, metadata in releases])
    return RunData(
        folder=folder,
        recipe=recipe,
        read_at=now,
        state=read_run_status(run, now),
        metrics=summarize_metrics(_checked_metrics(run)),
        events=list(run.events()),
        store=store,
        digests=digests,
        parameters=num_parameters(recipe.model, vocab_size) if vocab_size else None,
        checkpoint=checkpoint,
        releases=[(release.path.name, metadata) for release, metadata in releases],
        evaluations=[
            (f"{kind}, step {evaluation['step']:,}", evaluation)
            for kind, evaluation in evaluated
            if evaluation and evaluation["step"] is not None
        ],
        scores=releases_table(run.releases),
    )


def _checked_metrics(run: RunDir) -> Iterator[Json]:
    for number, row in enumerate(run.metrics(), 1):
        if not isinstance(row.get("tokens"), int):
            raise InputError(f"{run.metrics_path}:{number}: a row without tokens; correct or delete the line")
        for name in METRICS:
            if not isinstance(row.get(name), int | float | None):
                problem = f"{name} is {row[name]!r}, not a number"
                raise InputError(f"{run.metrics_path}:{number}: {problem}; correct or delete the line")
        yield row


def _with_origins(store: dict[str, Any], releases: list[Json]) -> dict[str, Any]:
    """Add the origins of sources whose raw files were deleted, from the metadata of earlier releases."""
    for metadata in releases:
        for name, source in metadata["store"]["sources"].items():
            if name in store["sources"] and store["sources"][name]["splits"] == source["splits"]:
                store["sources"][name]["origin"] = store["sources"][name]["origin"] or source["origin"]
    return store
