"""The folders of runs, checkpoints and releases, with the paths and contents of their files.

Only this module defines these paths. It does not import torch. Training, releases and trackers write the files.
"""

import difflib
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from tinyllama.errors import InputError
from tinyllama.files import Row, is_inside, is_locked, numbered_rows, read_json, read_json_if_exists, sha256_of
from tinyllama.recipe import Recipe

_CHECKPOINT_NAME = re.compile("step-([0-9]+)")
_HASHED_IF_PRESENT = ("state.json", "recipe.yaml", ".metadata")
"""Files, in addition to tensors, that are read from a checkpoint. The commit must have their hashes if they exist."""


class _PathInside:
    """Descriptor that returns the path of a file or folder inside the folder `path` of its owner."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, _: type) -> Path:
        return Path(owner.path, self.name)


@dataclass(frozen=True)
class ReleaseDir:
    """A release's folder, `RUN/releases/step-00000100`, or a release outside of any run."""

    path: Path
    metadata_path = _PathInside("release.json")
    """Lineage and the hash of every other file, written last."""
    evaluation_path = _PathInside("evaluation.json")
    """Scores of the released weights."""

    @property
    def exists(self) -> bool:
        """Whether the folder is a release."""
        return self.metadata_path.is_file()

    def metadata(self) -> Row:
        """Return the content of release.json. Raises InputError if the folder is not a release."""
        metadata = read_json(self.metadata_path) if self.exists else None
        if not isinstance(metadata, dict) or not isinstance(metadata.get("files"), dict):
            problem = "a release.json without its files" if self.exists else "no release.json"
            run = next((path for path in (self.path, *self.path.parents[:2]) if RunDir(path).is_started), "RUN")
            raise InputError(f"{self.path}: no release here ({problem}); run: tinyllama release {quote(str(run))}")
        for name in metadata["files"]:
            if not is_inside(name):
                problem = f"names {name!r}, a file outside its folder"
                raise InputError(f"{self.metadata_path}: {problem}; release the run again")
        return metadata

    def evaluation(self) -> Row | None:
        """Return the content of evaluation.json; None if the file does not exist or belongs to another step."""
        evaluation = read_json_if_exists(self.evaluation_path)
        return evaluation if evaluation and evaluation["step"] == self.metadata()["step"] else None


@dataclass(frozen=True)
class ReleasesDir:
    """The folder of a run's releases, `RUN/releases`, with the evaluations of the recipe's baselines."""

    path: Path
    table_path = _PathInside("releases.json")
    """One row per release and baseline."""
    lock_path = _PathInside("lock")
    """Lock of the process that makes a release."""
    cards_lock_path = _PathInside("cards.lock")
    """Lock of the process that writes the model cards."""

    def release(self, name: str) -> ReleaseDir:
        """Return the release with this name, which is the name of its checkpoint; the release may not exist."""
        return ReleaseDir(self.path / name)

    def releases(self) -> list[tuple[ReleaseDir, Row]]:
        """Return the run's releases with their metadata, in the order of their steps."""
        folders = [ReleaseDir(path.parent) for path in self.path.glob("[!.]*/release.json")]
        found = [(folder, folder.metadata()) for folder in folders]
        return sorted((pair for pair in found if pair[1]["step"] is not None), key=lambda pair: pair[1]["step"])

    def table(self) -> dict[str, list[Row]]:
        """Return the rows of releases.json: `releases`, sorted by number of tokens, and `baselines`."""
        return read_json_if_exists(self.table_path) or {"releases": [], "baselines": []}

    def baseline_path(self, name: str) -> Path:
        """Return the path of a baseline's evaluation; `name` is its folder or its name on the hub."""
        return self.path / "baselines" / f"{name.strip('/').replace('/', '--')}.json"

    def baseline_evaluation(self, name: str) -> Row | None:
        """Return a baseline's evaluation, or None if the baseline was not evaluated."""
        return read_json_if_exists(self.baseline_path(name))

    def baseline_evaluations(self) -> list[Row]:
        """Return the evaluations of the baselines, sorted by name."""
        return [read_json(path) for path in sorted(self.path.glob("baselines/*.json"))]

    def files_with_scores(self) -> list[Path]:
        """Return the files that contain the scores of releases and baselines."""
        paths = [self.table_path, *self.path.glob("[!.]*/evaluation.json"), *self.path.glob("baselines/*.json")]
        return sorted(path for path in paths if path.is_file())


@dataclass(frozen=True)
class CheckpointDir:
    """A checkpoint's folder, `RUN/checkpoints/step-00000100`."""

    path: Path

    @property
    def name(self) -> str:
        """Folder name."""
        return self.path.name

    @property
    def step(self) -> int:
        """Number of completed training steps, from the folder's name."""
        if not (match := _CHECKPOINT_NAME.fullmatch(self.name)):
            raise InputError(f"{self.path}: not a checkpoint's name; rename the folder to step-NUMBER")
        return int(match[1])

    @property
    def run(self) -> "RunDir":
        """Run to which the checkpoint belongs."""
        return RunDir(self.path.parent.parent)

    commit_path = _PathInside("commit.json")
    """SHA-256 of every other file, written last. A checkpoint without this file is incomplete."""
    state_path = _PathInside("state.json")
    """State that a resumed run needs in addition to the tensors."""
    recipe_path = _PathInside("recipe.yaml")
    """Copy of the run's recipe."""
    tokenizer_dir = _PathInside("tokenizer")
    """Copy of the run's tokenizer."""
    evaluation_path = _PathInside("evaluation.json")
    """Scores of the checkpoint, if `tinyllama evaluate` was called with the checkpoint's folder."""

    @property
    def tensor_paths(self) -> list[Path]:
        """Files with the tensors, in torch's distributed format (DCP)."""
        return sorted(self.path.glob("*.distcp"))

    @property
    def is_committed(self) -> bool:
        """Whether the checkpoint was written completely."""
        return self.commit_path.is_file()

    @property
    def commit_hash(self) -> str:
        """SHA-256 of the commit, which identifies the checkpoint's content."""
        return sha256_of(self.commit_path)

    def state(self) -> Row:
        """Return the content of state.json. Raises InputError if the file is invalid."""
        state = read_json(self.state_path)
        if not (isinstance(state, dict) and isinstance(state.get("vocab_size"), int | None)):
            raise InputError(f"{self.state_path}: not the state of a checkpoint; restore it, or delete {self.path}")
        return state

    @property
    def is_milestone(self) -> bool:
        """Whether the checkpoint is a milestone, which is never pruned. False if its state cannot be read."""
        try:
            return bool(self.state().get("milestone"))
        except (InputError, OSError):
            return False

    def find_damage(self) -> list[str]:
        """Return one line per mismatch between the files and the commit: an empty list for an intact checkpoint."""
        try:
            hashes = dict(read_json(self.commit_path)["sha256"].items())
        except (InputError, KeyError, TypeError, AttributeError):
            return [f"{self.commit_path} is not a complete commit"]
        unhashed = [name for name in _HASHED_IF_PRESENT if (self.path / name).exists() and name not in hashes]
        damage = [f"{self.commit_path} does not name {name}" for name in unhashed]
        for name, expected in hashes.items():
            path = self.path / name
            if not is_inside(name):
                damage.append(f"{self.commit_path} names {name!r}, a file outside its folder")
            elif not path.is_file():
                damage.append(f"{path} is missing")
            elif sha256_of(path) != expected:
                damage.append(f"{path} does not match its hash")
        return damage

    def is_released_as(self, release: ReleaseDir) -> bool:
        """Return whether a release was made from this checkpoint, not from one of an earlier run with the same name."""
        return release.exists and release.metadata()["checkpoints"].get(self.name) == self.commit_hash

    def delete(self) -> None:
        """Delete the checkpoint, its commit first, so that a partly deleted checkpoint does not count as committed."""
        self.commit_path.unlink(missing_ok=True)
        shutil.rmtree(self.path)


def similar_run(path: str | Path) -> str:
    """Return a suggestion of the run in `runs` whose name is most similar to that of `path`, or an empty string."""
    names = [other.name for other in Path("runs").glob("*") if RunDir(other).is_started and other != Path(path)]
    close = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"did you mean runs/{close[0]}?" if close else ""


def batches_of(rollbacks: Iterable[Row]) -> frozenset[int]:
    """Return the indices of the batches that the given rollback records exclude from training."""
    return frozenset(batch for record in rollbacks for batch in record["batches"])


@dataclass(frozen=True)
class RunDir:
    """The folder of a run, `runs/NAME`."""

    path: Path

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> "RunDir":
        """Return the folder of a recipe's run; the folder may not exist."""
        return cls(Path("runs") / recipe.name)

    @classmethod
    def open(cls, path: str | Path) -> "RunDir":
        """Return an existing run. Raises InputError if the folder contains no recipe."""
        run = cls(Path(path))
        if not run.recipe_path.is_file():
            remedy = similar_run(path) or "correct the path, or run: tinyllama train RECIPE"
            raise InputError(f"{path}: no run here (no recipe.yaml); {remedy}")
        return run

    @property
    def name(self) -> str:
        """Folder name, which may differ from the recipe's name."""
        return self.path.resolve().name

    recipe_path = _PathInside("recipe.yaml")
    """Recipe with which training was last started."""
    metrics_path = _PathInside("metrics.jsonl")
    """One row of metrics per step (JSON Lines)."""
    events_path = _PathInside("events.jsonl")
    """One row per event (JSON Lines)."""
    evaluations_path = _PathInside("evaluations.jsonl")
    """One row per evaluation during training (JSON Lines)."""
    lock_path = _PathInside("lock")
    """Lock that a training process holds."""
    store_manifest_path = _PathInside("store.json")
    """Copy of the token store's manifest."""
    tokenizer_dir = _PathInside("tokenizer")
    """Copy of the recipe's tokenizer."""
    initial_weights_path = _PathInside("initial_weights.json")
    """Record of the external initial weights, so that the run can be resumed after these weights were deleted."""
    rollbacks_path = _PathInside("skipped_batches.json")
    """Record of the rollbacks and the batches that they excluded; see `rollbacks`."""
    checkpoints_dir = _PathInside("checkpoints")
    """Folder of the checkpoints."""

    @property
    def releases(self) -> ReleasesDir:
        """Folder of the releases."""
        return ReleasesDir(self.path / "releases")

    trackers_dir = _PathInside("trackers")
    """Folder of the trackers' positions, locks and logs."""
    wandb_id_path = _PathInside("trackers/wandb.id")
    """ID of the run on W&B."""
    wandb_entries_path = _PathInside("trackers/wandb.inserted.json")
    """Scores and alerts that W&B received, and after which steps."""
    tensorboard_dir = _PathInside("tensorboard")
    """Folder of TensorBoard's event files."""

    def tracker_position_path(self, tracker: str) -> Path:
        """Return the file with a tracker's position in the run."""
        return self.trackers_dir / f"{tracker}.json"

    def tracker_lock_path(self, tracker: str) -> Path:
        """Return the file that a process locks while it delivers the run's data to a tracker."""
        return self.trackers_dir / f"{tracker}.lock"

    def tracker_log_path(self, tracker: str) -> Path:
        """Return the file with the output of a tracker's process."""
        return self.trackers_dir / f"{tracker}.log"

    @property
    def is_started(self) -> bool:
        """Whether training was ever started in this folder."""
        return any(path.is_file() for path in (self.events_path, self.metrics_path, self.lock_path))

    @property
    def is_training(self) -> bool:
        """Whether any process, including this one, is training the run."""
        return is_locked(self.lock_path)

    def recipe(self) -> Recipe:
        """Return the run's recipe. Raises InputError if the recipe is invalid."""
        return Recipe.load(self.recipe_path)

    def initial_weights(self) -> Row | None:
        """Return `source`, `digest` and `vocab_size` of the run's external initial weights, or None.

        `changed` lists the fields of the context and the rotary embedding that differ from the weights, if any.
        """
        return read_json_if_exists(self.initial_weights_path)

    def rollbacks(self) -> list[Row]:
        """Return the rollbacks, oldest first, each with the excluded `batches`, `checkpoint`, `step` and `reason`."""
        return read_json_if_exists(self.rollbacks_path) or []

    def checkpoint(self, step: int) -> CheckpointDir:
        """Return the checkpoint of a step; the checkpoint may not exist."""
        return CheckpointDir(self.checkpoints_dir / f"step-{step:08d}")

    def checkpoints(self) -> list[CheckpointDir]:
        """Return all committed checkpoints, oldest first."""
        found = [CheckpointDir(path.parent) for path in self.checkpoints_dir.glob("step-[0-9]*/commit.json")]
        checkpoints = [checkpoint for checkpoint in found if _CHECKPOINT_NAME.fullmatch(checkpoint.name)]
        return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)

    def newest_checkpoint(self) -> CheckpointDir | None:
        """Return the newest committed checkpoint, or None."""
        return next(reversed(self.checkpoints()), None)

    def find_checkpoint(self, step: int | None = None) -> CheckpointDir:
        """Return the committed checkpoint of a step, by default the newest. Raises InputError if none is found."""
        checkpoints = {checkpoint.step: checkpoint for checkpoint in self.checkpoints()}
        if not checkpoints:
            raise InputError(f"{self.path}: no complete checkpoint yet; train it with its recipe, {self.recipe_path}")
        step = max(checkpoints) if step is None else step
        if step not in checkpoints:
            steps = ", ".join(map(str, checkpoints))
            raise InputError(f"{self.path}: no checkpoint of step {step}; give one of {steps}")
        return checkpoints[step]

    def prune_checkpoints(self, keep: int, average: int = 1) -> None:
        """Delete all checkpoints except the newest `keep` complete checkpoints and the checkpoints that releases need.

        Releases need the milestones and, for each milestone without a release, the newest `average` checkpoints before.
        """
        checkpoints = self.checkpoints()
        kept = {checkpoint.path for checkpoint in checkpoints[-keep:]}
        for number, checkpoint in enumerate(checkpoints, 1):
            if checkpoint.is_milestone:
                needed = 1 if self.releases.release(checkpoint.name).exists else average
                kept |= {other.path for other in checkpoints[max(0, number - needed) : number]}
        for folder in self.checkpoints_dir.glob("step-*"):
            if folder not in kept:
                CheckpointDir(folder).delete()

    def pending_milestones(self) -> list[int]:
        """Return the steps of the milestones whose release is missing or not completely scored, oldest first."""
        rows = self.releases.table()["releases"]
        complete = {(row["step"], row["commit"]) for row in rows if row["complete"]}
        milestones = [checkpoint for checkpoint in self.checkpoints() if checkpoint.is_milestone]
        return [found.step for found in milestones if (found.step, found.commit_hash) not in complete]

    def metrics(self, up_to_step: int | None = None, damaged: list[int] | None = None) -> Iterator[Row]:
        """Yield the rows of metrics up to a step, by default all rows; skip an incomplete last line.

        Raises InputError, with the line number, for an invalid row up to that step. The line numbers of later invalid
        rows, and of rows whose step does not increase, are appended to `damaged`.
        """
        is_reached, step, damaged = up_to_step == 0, 0, [] if damaged is None else damaged
        for number, row in numbered_rows(self.metrics_path):
            is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
            if not is_row and not is_reached:
                raise InputError(f"{self.metrics_path}:{number}: not a row with a step; correct or delete the line")
            is_reached |= is_row and up_to_step is not None and row["step"] >= up_to_step
            if is_row and (up_to_step is None or step < row["step"] <= up_to_step):
                step = row["step"]
                yield row
            elif not is_row or row["step"] <= step:
                damaged.append(number)

    def events(self) -> Iterator[Row]:
        """Yield all events, oldest first. Raises InputError, with the line number, for an invalid event."""
        return _rows_with(self.events_path, {"time", "event", "step"}, "an event with time and step")

    def evaluations(self) -> Iterator[Row]:
        """Yield the evaluations during training, oldest first, as fields of `evaluate.results.Evaluation`.

        Raises InputError, with the line number, for an invalid evaluation.
        """
        return _rows_with(self.evaluations_path, {"step", "tokens", "rows"}, "an evaluation with step and tokens")


def _rows_with(path: Path, names: set[str], what: str) -> Iterator[Row]:
    """Yield the rows of a file in the format JSON Lines; raise InputError for a row that lacks one of the names."""
    for number, row in numbered_rows(path):
        if not (isinstance(row, dict) and names <= row.keys()):
            raise InputError(f"{path}:{number}: not {what}; correct or delete the line")
        yield row
