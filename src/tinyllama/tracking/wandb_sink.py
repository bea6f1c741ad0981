"""Sink for Weights & Biases (W&B): one W&B run in the recipe's project, with the same ID at each start of training.

W&B buffers rows and can flush them only by ending the W&B run, so a kill loses the newest rows. Therefore items count
as stored only after `close`. After a kill, all items since the last `close` are delivered again, with the same W&B
steps. The W&B step of a row is the training step plus the number of scores and alerts that were delivered before the
row. The newest W&B step shows which rows W&B has received. Online, the server reports this step. Offline, it is the
newest step of the last process that called `close`, because the folder of a killed process in `RUN/wandb` is deleted.
Logged rows cannot be removed. After a rollback, W&B keeps the first values of the repeated steps.
"""

import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import wandb

from tinyllama.files import Row, atomic_write, fsync_path, read_json, read_regular_file, reject_symlink, write_json
from tinyllama.recipe import Recipe
from tinyllama.runs.log import describe_event, event_kind, event_title
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import Scores, SinkPosition


class WandbSink:
    """Sink for a run on W&B. The x axis is the number of tokens."""

    def __init__(self, run: RunDir, recipe: Recipe, position: SinkPosition) -> None:
        self.safe_step, self.step, self.is_closed = position.step, position.step, False
        """Newest step when `close` was last called, newest delivered step, and whether this process called `close`."""
        self.path, self.folder = run.wandb_entries_path, run.path / "wandb"
        self.inserted: dict[str, Any] = {
            "entries": [],
            "num_safe": 0,
            "baselines": {},
            "newest": -1,
            "unfinished": None,
        }
        """`entries`: scores and alerts, each with the training step after which it is delivered. `num_safe`: number of
        entries that W&B had received at the last `close`. `baselines`: scores of the baselines. `newest`: newest W&B
        step at the last `close`. `unfinished`: name of the folder of an offline process that has not called `close`."""
        if self.path.is_file():
            self.inserted |= read_json(self.path)
        if (unfinished := self.inserted["unfinished"]) and re.fullmatch(r"offline-run-[\w-]+", unfinished):
            reject_symlink(self.folder)
            shutil.rmtree(self.folder / unfinished, ignore_errors=True)
        run_id = _read_or_create_id(run.wandb_id_path)
        self.run = wandb.init(
            project=recipe.track.wandb,
            name=recipe.name,
            id=run_id,
            resume="allow",
            dir=run.path,
            config=recipe.model_dump(mode="json") | {"baselines": self.inserted["baselines"]},
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")
        self.newest = self.inserted["newest"] if self.run.offline else self.run.starting_step - 1
        """Newest W&B step that earlier processes have logged."""
        if self.run.offline:
            self.inserted["unfinished"] = Path(self.run.dir).parent.name
            write_json(self.path, self.inserted)
        self.num_delivered = 0
        """Number of scores and alerts that this process and earlier processes have delivered."""
        self._deliver_entries()

    def log_metrics(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Log rows of metrics; a row has the same W&B step in every process."""
        for row in rows:
            self._log(row["step"] + self.num_delivered, row)
            self.step = row["step"]
            self._deliver_entries()

    def log_events(self, events: Sequence[Row]) -> None:
        """Send an alert for each error; W&B may send alerts by e-mail."""
        for event in events:
            if event_kind(event).level == "error":
                alert = {"title": event_title(event), "text": describe_event(event)}
                self._insert({"alert": alert, "time": event["time"]})

    def log_scores(self, row: Row, time: float) -> None:
        """Log a release's scores at the release's number of tokens."""
        self._insert({"row": row})

    def set_baselines(self, baselines: dict[str, Scores]) -> None:
        """Add the baselines to the run's configuration."""
        self.inserted["baselines"] = baselines
        write_json(self.path, self.inserted)
        self.run.config.update({"baselines": baselines}, allow_val_change=True)

    def rewind(self, step: int) -> None:
        """Return None, because W&B cannot remove logged rows."""

    def durable_position(self, position: SinkPosition) -> SinkPosition:
        """Return the position; before `close`, its step is the newest step of the last process that called `close`."""
        return position if self.is_closed else replace(position, step=self.safe_step)

    def close(self) -> None:
        """Wait until W&B has received all items."""
        self.run.finish()
        for path in self.folder.glob(f"*-{self.run.id}/*.wandb") if self.run.offline else ():
            fsync_path(path)
        newest = max(self.inserted["newest"], self.step + self.num_delivered)
        self.inserted |= {"num_safe": self.num_delivered, "newest": newest, "unfinished": None}
        write_json(self.path, self.inserted)
        self.is_closed = True

    def _insert(self, entry: dict[str, Any]) -> None:
        """Record an entry (scores or an alert) and its training step for later processes, then deliver the entry."""
        entries = self.inserted["entries"]
        after = max([self.step, *(known["after"] for known in entries[-1:])])
        if any(known | entry == known for known in entries):  # a process was killed before its position was saved
            return
        entries.append({"after": after, **entry})
        write_json(self.path, self.inserted)
        self._deliver_entries()

    def _deliver_entries(self) -> None:
        """Deliver the recorded scores and alerts up to the current training step."""
        for entry in self.inserted["entries"][self.num_delivered :]:
            if entry["after"] > self.step:
                return
            is_safe = self.num_delivered < self.inserted["num_safe"]
            self.num_delivered += 1
            wandb_step = entry["after"] + self.num_delivered
            if is_safe or wandb_step <= self.newest:
                continue
            if "row" in entry:
                self._log(wandb_step, entry["row"])
            else:
                self.run.alert(**entry["alert"], level="ERROR")

    def _log(self, wandb_step: int, row: Row) -> None:
        """Log a row at a W&B step, unless W&B already has that step."""
        if wandb_step > self.newest:
            self.run.log(row, step=wandb_step, commit=True)


def _read_or_create_id(path: Path) -> str:
    """Return the run's W&B ID, a random string that is chosen when the run is first shown."""
    if not path.is_file():
        with atomic_write(path) as file:
            file.write(uuid.uuid4().hex.encode())
    return read_regular_file(path).decode()
