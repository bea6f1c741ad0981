"""What a report tells of: a run's folder, read whole but for its weights.

Reads recipe.yaml, metrics.jsonl, events.jsonl, store.json, checkpoints' states and releases; what is not there yet, or
no more, is left out. Only the recipe must be there: it is what makes a folder a run.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError
from tinyllama.files import read_json, sha256_of
from tinyllama.hardware import format_hardware
from tinyllama.model.flops import num_parameters
from tinyllama.recipe import Recipe
from tinyllama.release.index import releases_table
from tinyllama.release.lineage import store_facts
from tinyllama.report.curves import METRICS, Metrics, summarize_metrics
from tinyllama.runs.checkpoint import read_state
from tinyllama.runs.listing import RunState, read_run_status
from tinyllama.runs.run_dir import RunDir

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run as its folder has it."""

    folder: Path
    recipe: Recipe
    read_at: float
    """Seconds since 1970."""
    state: RunState
    metrics: Metrics
    events: list[Facts]
    """Oldest first."""
    store: Facts | None
    """As in release.json: `inputs`, `sources`; None before training has begun."""
    digests: Mapping[str, str]
    """What the run was made from -> SHA-256."""
    parameters: int | None
    """None before the tokenizer's size is known."""
    checkpoint: Facts
    """The newest checkpoint's state.json; empty without one."""
    releases: list[tuple[str, Facts]]
    """Folder's name and release.json of each, in the order of their steps."""
    evaluations: list[tuple[str, Facts]]
    """What was scored and its evaluation.json."""
    table: Mapping[str, list[dict[str, Any]]]
    """`releases_table`'s."""

    @property
    def name(self) -> str:
        """The folder's: a recipe may have been run twice."""
        return self.folder.resolve().name

    @property
    def ranks(self) -> list[int]:
        """How many ranks trained, each number once, in order."""
        return list(dict.fromkeys(event["ranks"] for event in self.events if event.get("ranks")))

    @property
    def hardware(self) -> str | None:
        """What the run trained on, with its peak; None before the first checkpoint, and of earlier versions' runs."""
        states = [self.checkpoint, *(facts for _, facts in reversed(self.releases))]
        used: list[Facts] = next((state["hardware"] for state in states if state.get("hardware")), [])
        return "; then ".join(map(format_hardware, used)) or None


def read_run(folder: Path) -> Run:
    """Read a run as it is now. Raises InputError where there is none, or a file of it is broken."""
    if not (folder / "recipe.yaml").is_file():
        raise InputError(f"{folder}: no run here (no recipe.yaml); give a folder that `tinyllama train` wrote")
    now, recipe = time.time(), Recipe.load(folder / "recipe.yaml")
    manifest = read_json(folder / "store.json") if (folder / "store.json").is_file() else None
    checkpoint = _newest_state(folder)
    releases = _releases(folder)
    return Run(
        folder=folder,
        recipe=recipe,
        read_at=now,
        state=read_run_status(folder, now),
        metrics=summarize_metrics(_metrics(folder / "metrics.jsonl")),
        events=_events(folder / "events.jsonl"),
        store=_with_origins(store_facts(manifest, recipe), releases) if manifest else None,
        digests=_digests(folder, recipe, manifest, checkpoint),
        parameters=_parameters(recipe, manifest, checkpoint),
        checkpoint=checkpoint,
        releases=releases,
        evaluations=_evaluations(folder),
        table=releases_table(folder / "releases"),
    )


def _metrics(path: Path) -> Any:
    for number, row in enumerate(RunDir(path.parent).metrics(), 1):
        if not (isinstance(row.get("step"), int) and isinstance(row.get("tokens"), int)):
            raise InputError(f"{path}:{number}: no row of metrics (step and tokens); mend or delete the line")
        for name in METRICS:
            if not isinstance(row.get(name), int | float | None):
                raise InputError(f"{path}:{number}: {name} is {row[name]!r}, no number; mend or delete the line")
        yield row


def _events(path: Path) -> list[Facts]:
    return list(RunDir(path.parent).events())


def _newest_state(folder: Path) -> Facts:
    found = sorted(folder.glob("checkpoints/step-*/commit.json"))  # as many digits each, up to 99,999,999 steps
    return read_state(found[-1].parent) if found else {}


def _releases(folder: Path) -> list[tuple[str, Facts]]:
    found = [(path.parent.name, read_json(path)) for path in folder.glob("releases/[!.]*/release.json")]
    return sorted((pair for pair in found if pair[1]["step"] is not None), key=lambda pair: pair[1]["step"])


def _evaluations(folder: Path) -> list[tuple[str, Facts]]:
    """Of releases, and of checkpoints that were scored by themselves."""
    kinds = (("release", "releases/[!.]*/evaluation.json"), ("checkpoint", "checkpoints/step-*/evaluation.json"))
    found = [(kind, read_json(path)) for kind, pattern in kinds for path in sorted(folder.glob(pattern))]
    return [(f"{kind}, step {scores['step']:,}", scores) for kind, scores in found if scores["step"] is not None]


def _with_origins(store: dict[str, Any], releases: list[tuple[str, Facts]]) -> dict[str, Any]:
    """Where the raw files are gone, a release still knows what they were."""
    for _, facts in releases:
        for name, source in facts["store"]["sources"].items():
            if name in store["sources"] and store["sources"][name]["splits"] == source["splits"]:
                store["sources"][name]["origin"] = store["sources"][name]["origin"] or source["origin"]
    return store


def _digests(folder: Path, recipe: Recipe, manifest: Facts | None, checkpoint: Facts) -> dict[str, str]:
    digests = {"recipe": recipe.digest}
    if manifest:
        digests["token store, its manifest"] = sha256_of(folder / "store.json")
        digests["tokenizer"] = checkpoint.get("tokenizer") or manifest["tokenizer"]["digest"]
    return digests


def _parameters(recipe: Recipe, manifest: Facts | None, checkpoint: Facts) -> int | None:
    size = checkpoint.get("vocab_size") or (manifest and manifest["tokenizer"]["vocab_size"])
    return num_parameters(recipe.model, size) if size else None
