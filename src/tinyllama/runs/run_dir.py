"""The folder of a run: the only module that defines the paths and contents of a run's files.

Training, releases and trackers write the files. Every module that shows or continues a run reads the files through
`RunDir`. Imports no torch; `runs.checkpoint` reads and writes the tensors.
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tinyllama.errors import InputError
from tinyllama.files import is_inside, is_locked, read_json, sha256_of
from tinyllama.recipe import Recipe
from tinyllama.runs.jsonl import Row, last_rows, numbered_rows, rows_since
from tinyllama.runs.release_dir import ReleaseDir, ReleasesDir

_CHECKPOINT_NAME = re.compile("step-([0-9]+)")
_HASHED_IF_PRESENT = ("state.json", "recipe.yaml", ".metadata")
"""Files that are read from a checkpoint; the commit must contain the hash of each such file that exists."""
_MAX_RECIPE_BYTES = 1 << 20


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
        """Number of training steps before the checkpoint, from the folder's name."""
        if not (match := _CHECKPOINT_NAME.fullmatch(self.name)):
            raise InputError(f"{self.path}: not a checkpoint's name; rename the folder to step-NUMBER")
        return int(match[1])

    @property
    def run(self) -> "RunDir":
        """Run that the checkpoint belongs to."""
        return RunDir(self.path.parent.parent)

    @property
    def commit_path(self) -> Path:
        """File with the SHA-256 of every other file, written last. A checkpoint without this file is incomplete."""
        return self.path / "commit.json"

    @property
    def state_path(self) -> Path:
        """File with the state that a resumed run needs besides tensors."""
        return self.path / "state.json"

    @property
    def recipe_path(self) -> Path:
        """Copy of the run's recipe."""
        return self.path / "recipe.yaml"

    @property
    def tokenizer_dir(self) -> Path:
        """Copy of the run's tokenizer."""
        return self.path / "tokenizer"

    @property
    def evaluation_path(self) -> Path:
        """File with the checkpoint's scores, if `tinyllama evaluate` was called with the checkpoint's folder."""
        return self.path / "evaluation.json"

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
        """Return one line per mismatch between the files and the commit; empty for an intact checkpoint."""
        try:
            hashes = dict(read_json(self.commit_path)["sha256"].items())
        except (InputError, KeyError, TypeError, AttributeError):
            return [f"{self.commit_path} is not a complete commit"]
        damage = [
            f"{self.commit_path} does not name {name}"
            for name in _HASHED_IF_PRESENT
            if (self.path / name).exists() and name not in hashes
        ]
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
        """Return whether a release was made from this checkpoint, not from an earlier run of the same name."""
        return release.exists and release.metadata()["checkpoints"].get(self.name) == self.commit_hash

    def delete(self) -> None:
        """Delete the checkpoint, its commit first, so that a partly deleted checkpoint does not count as committed."""
        self.commit_path.unlink(missing_ok=True)
        shutil.rmtree(self.path)


def batches_of(rollbacks: Iterable[Row]) -> frozenset[int]:
    """Return the indices of the batches that these records of rollbacks exclude from training."""
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
        """Return an existing run. Raises InputError if the folder holds no recipe."""
        run = cls(Path(path))
        if not run.recipe_path.is_file():
            raise InputError(f"{path}: no run here (no recipe.yaml); give a folder that `tinyllama train` wrote")
        return run

    @property
    def name(self) -> str:
        """Folder name, which may differ from the recipe's name."""
        return self.path.resolve().name

    @property
    def recipe_path(self) -> Path:
        """Recipe of the newest start."""
        return self.path / "recipe.yaml"

    @property
    def metrics_path(self) -> Path:
        """File with one JSON row per step."""
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        """File with one JSON row per event."""
        return self.path / "events.jsonl"

    @property
    def lock_path(self) -> Path:
        """Lock that a training process holds."""
        return self.path / "lock"

    @property
    def store_manifest_path(self) -> Path:
        """Copy of the token store's manifest."""
        return self.path / "store.json"

    @property
    def tokenizer_dir(self) -> Path:
        """Copy of the recipe's tokenizer."""
        return self.path / "tokenizer"

    @property
    def initial_weights_path(self) -> Path:
        """Record of the external weights that the run started from; see `initial_weights`."""
        return self.path / "initial_weights.json"

    @property
    def rollbacks_path(self) -> Path:
        """Record of the rollbacks and the batches that they excluded; see `rollbacks`."""
        return self.path / "skipped_batches.json"

    @property
    def checkpoints_dir(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def releases(self) -> ReleasesDir:
        """Folder of the releases."""
        return ReleasesDir(self.path / "releases")

    @property
    def trackers_dir(self) -> Path:
        """Folder of the trackers' positions, locks and logs."""
        return self.path / "trackers"

    def tracker_position_path(self, tracker: str) -> Path:
        """Return the file with a tracker's position in the run."""
        return self.trackers_dir / f"{tracker}.json"

    @property
    def is_started(self) -> bool:
        """Whether training was ever started in this folder."""
        return any(path.is_file() for path in (self.events_path, self.metrics_path, self.lock_path))

    @property
    def is_training(self) -> bool:
        """Whether a process is training the run, including this process."""
        return is_locked(self.lock_path)

    def recipe(self) -> Recipe:
        """Return the run's recipe. Raises InputError if the recipe is invalid."""
        return Recipe.load(self.recipe_path)

    def recipe_fields(self) -> Row:
        """Return the recipe's fields without validation, from any version; empty if there is no recipe.

        Raises InputError if the file is not YAML or not a mapping.
        """
        if not self.recipe_path.is_file():
            return {}
        remedy = "copy a checkpoint's recipe.yaml, or train again, which rewrites it"
        try:
            with self.recipe_path.open("rb") as file:
                data = file.read(_MAX_RECIPE_BYTES)
            fields = yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError as error:
            line = f":{mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
            raise InputError(f"{self.recipe_path}{line}: not valid YAML; {remedy}") from None
        if not isinstance(fields, dict):
            raise InputError(f"{self.recipe_path}: not a recipe; {remedy}")
        return fields

    def initial_weights(self) -> Row | None:
        """Return `source`, `digest` and `vocab_size` of the external weights that the run started from, or None.

        These values are recorded so that a run can be resumed after the external weights were deleted.
        """
        return read_json(self.initial_weights_path) if self.initial_weights_path.is_file() else None

    def rollbacks(self) -> list[Row]:
        """Return the rollbacks, oldest first, each with the excluded `batches`, `checkpoint`, `step` and `reason`."""
        records: list[Row] = read_json(self.rollbacks_path) if self.rollbacks_path.is_file() else []
        return records

    def skipped_batches(self) -> frozenset[int]:
        """Return the indices of all batches that rollbacks excluded from training."""
        return batches_of(self.rollbacks())

    def checkpoint(self, step: int) -> CheckpointDir:
        """Return the checkpoint of a step; the checkpoint may not exist."""
        return CheckpointDir(self.checkpoints_dir / f"step-{step:08d}")

    def checkpoints(self) -> list[CheckpointDir]:
        """Return all committed checkpoints, oldest first."""
        folders = [path.parent for path in self.checkpoints_dir.glob("step-[0-9]*/commit.json")]
        checkpoints = [CheckpointDir(folder) for folder in folders if _CHECKPOINT_NAME.fullmatch(folder.name)]
        return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)

    def newest_checkpoint(self) -> CheckpointDir | None:
        """Return the newest committed checkpoint, or None."""
        return next(reversed(self.checkpoints()), None)

    def find_checkpoint(self, step: int | None = None) -> CheckpointDir:
        """Return the committed checkpoint of a step, by default the newest. Raises InputError if none is found."""
        checkpoints = {checkpoint.step: checkpoint for checkpoint in self.checkpoints()}
        if not checkpoints:
            raise InputError(f"{self.path}: the run has no complete checkpoint yet; train it further")
        if step is None:
            step = max(checkpoints)
        if step not in checkpoints:
            steps = ", ".join(map(str, checkpoints))
            raise InputError(f"{self.path}: no checkpoint of step {step}; give one of {steps}")
        return checkpoints[step]

    def prune_checkpoints(self, keep: int, average: int = 1) -> None:
        """Delete all checkpoints except the newest `keep` complete checkpoints and the checkpoints that releases need.

        Releases need the milestones and, for a milestone without a release, the newest `average` checkpoints up to it.
        """
        checkpoints = self.checkpoints()
        kept = {checkpoint.path for checkpoint in checkpoints[-keep:]}
        for number, checkpoint in enumerate(checkpoints, 1):
            if checkpoint.is_milestone:
                is_released = self.releases.release(checkpoint.name).exists
                needed = 1 if is_released else average
                kept |= {other.path for other in checkpoints[max(0, number - needed) : number]}
        for folder in self.checkpoints_dir.glob("step-*"):
            if folder not in kept:
                CheckpointDir(folder).delete()

    def pending_milestones(self) -> list[int]:
        """Return the steps of the milestones without a completely scored release, oldest first."""
        rows = self.releases.table()["releases"]
        complete = {(row["step"], row["commit"]) for row in rows if row["complete"]}
        milestones = [checkpoint for checkpoint in self.checkpoints() if checkpoint.is_milestone]
        return [found.step for found in milestones if (found.step, found.commit_hash) not in complete]

    def metrics(self, up_to_step: int | None = None, damaged: list[int] | None = None) -> Iterator[Row]:
        """Yield the rows of metrics up to a step, by default all rows; skip an incomplete last line.

        Raises InputError, with the line number, for an invalid row up to that step. The line numbers of later invalid
        rows are appended to `damaged`.
        """
        is_reached = up_to_step == 0
        for number, row in numbered_rows(self.metrics_path):
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                is_reached = is_reached or (up_to_step is not None and row["step"] >= up_to_step)
                if up_to_step is None or row["step"] <= up_to_step:
                    yield row
            elif not is_reached:
                raise InputError(f"{self.metrics_path}:{number}: not a row with a step; correct or delete the line")
            elif damaged is not None:
                damaged.append(number)

    def events(self) -> Iterator[Row]:
        """Yield all events, oldest first. Raises InputError, with the line number, for an invalid event."""
        for number, row in numbered_rows(self.events_path):
            if not (isinstance(row, dict) and {"time", "event", "step"} <= row.keys()):
                problem = "not an event with time, event and step"
                raise InputError(f"{self.events_path}:{number}: {problem}; correct or delete the line")
            yield row

    def metrics_since(self, offset: int) -> tuple[list[Row], int]:
        """Return the next rows of metrics after byte `offset`, and the new offset: see `rows_since`."""
        return rows_since(self.metrics_path, offset)

    def events_since(self, offset: int) -> tuple[list[Row], int]:
        """Return the next events after byte `offset`, and the new offset: see `rows_since`."""
        return rows_since(self.events_path, offset)

    def last_metrics(self, num_bytes: int) -> list[Row]:
        """Return the valid rows in the last `num_bytes` of the metrics."""
        return [row for row in last_rows(self.metrics_path, num_bytes) if "step" in row and "tokens" in row]

    def last_events(self, num_bytes: int) -> list[Row]:
        """Return the valid rows in the last `num_bytes` of the events."""
        return last_rows(self.events_path, num_bytes)
