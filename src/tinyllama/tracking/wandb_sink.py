"""Weights & Biases as a sink: one run of the recipe's project, of one identity however often training starts.

W&B buffers rows and can only flush them by ending its run, so a kill loses the newest. Therefore nothing counts as safe
before `close`, and all later rows are delivered again after a kill, each with the W&B step that it had the first time:
the training step, plus the scores and alerts that came before it. W&B has the rows up to its newest step, which its
server reports online and its files (`RUN/wandb`) hold offline. Logged rows cannot be removed: where a run rolled back
to a checkpoint, W&B keeps the first numbers of the steps that are done again.
"""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import wandb

from tinyllama.files import atomic_write, fsync_path, read_json, write_json
from tinyllama.recipe import Recipe
from tinyllama.tracking.alerts import alert_of
from tinyllama.tracking.follow import SinkPosition
from tinyllama.tracking.tail import Row, Scores

_HEADER_BYTES, _BLOCK_BYTES = 7, 32768
"""Of a .wandb file: its own header, a chunk's header (the same size), and a block (LevelDB's log format)."""
_WHOLE, _LAST = 1, 4
"""Kinds of a chunk with which a record ends."""


class Wandb:
    """A run on W&B; its axis is the tokens."""

    def __init__(self, run: Path, recipe: Recipe, position: SinkPosition) -> None:
        self.position, self.step, self.is_closed = position, position.step, False
        """Where the last closed process ended; the newest training step that was delivered; whether all is safe."""
        self.path = run / "trackers" / "wandb.inserted.json"
        self.inserted: dict[str, Any] = {"entries": [], "num_safe": 0, "baselines": {}}
        """Scores and alerts, each with the training step after which it was delivered, and how many of them W&B had at
        the last `close`; and the baselines."""
        if self.path.is_file():
            self.inserted = read_json(self.path)
        identity = _identity(run / "trackers" / "wandb.id")
        self.run = wandb.init(
            project=recipe.track.wandb,
            name=recipe.name,
            id=identity,
            resume="allow",
            dir=run,
            config=recipe.model_dump(mode="json") | {"baselines": self.inserted["baselines"]},
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")
        self.files = [*run.glob(f"wandb/*-{identity}/*.wandb")]
        self.newest = max(map(newest_step, self.files), default=-1) if self.run.offline else self.run.starting_step - 1
        """The newest W&B step that W&B has from earlier processes."""
        self.num_passed = 0
        self._deliver_entries()

    def rows(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Show metrics, each with the W&B step that it has in any process."""
        for row in rows:
            self._log(row["step"] + self.num_passed, row)
            self.step = row["step"]
            self._deliver_entries()

    def events(self, events: Sequence[Row], losses: tuple[float, float] | None) -> None:
        """Send an alert of what went wrong; W&B may mail it."""
        for event in events:
            alert = alert_of(event)
            if alert.level == "error":
                self._insert({"alert": {"title": alert.title, "text": alert.text}, "time": event["time"]})

    def scores(self, row: Row, time: float) -> None:
        """Show a release's scores at its tokens."""
        self._insert({"row": row})

    def baselines(self, baselines: dict[str, Scores]) -> None:
        """Put them beside the recipe."""
        self.inserted["baselines"] = baselines
        write_json(self.path, self.inserted)
        self.run.config.update({"baselines": baselines}, allow_val_change=True)

    def go_back(self, step: int) -> None:
        """Nothing can be taken back."""

    def held(self, progress: SinkPosition) -> SinkPosition:
        """Return the position with the step where the last process closed, until this one has."""
        return progress if self.is_closed else replace(progress, step=self.position.step)

    def close(self) -> None:
        """Wait until W&B has all."""
        self.run.finish()
        for path in self.files:
            fsync_path(path)
        self.inserted["num_safe"] = self.num_passed
        write_json(self.path, self.inserted)
        self.is_closed = True

    def _insert(self, entry: dict[str, Any]) -> None:
        """Deliver scores or an alert; its place is written down first, so that a new process finds it there."""
        entries = self.inserted["entries"]
        after = max([self.step, *(known["after"] for known in entries[-1:])])
        if any(known | entry == known for known in entries):  # a process was killed before its position was saved
            return
        entries.append({"after": after, **entry})
        write_json(self.path, self.inserted)
        self._deliver_entries()

    def _deliver_entries(self) -> None:
        """Deliver the scores and alerts that come before the row after `step`."""
        for entry in self.inserted["entries"][self.num_passed :]:
            if entry["after"] > self.step:
                return
            is_safe = self.num_passed < self.inserted["num_safe"]
            self.num_passed += 1
            number = entry["after"] + self.num_passed
            if is_safe or number <= self.newest:
                continue
            if "row" in entry:
                self._log(number, entry["row"])
            else:
                self.run.alert(**entry["alert"], level="ERROR")

    def _log(self, number: int, row: Row) -> None:
        """Log a row at a W&B step, unless W&B has it."""
        if number > self.newest:
            self.run.log(row, step=number, commit=True)


def _identity(path: Path) -> str:
    """The run's identity at W&B, made up when it is first shown."""
    if not path.is_file():
        with atomic_write(path) as file:
            file.write(uuid.uuid4().hex.encode())
    return path.read_text()


def newest_step(path: Path) -> int:
    """Return the newest W&B step with a complete row in a .wandb file; -1 where there is none."""
    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415 - needed offline alone

    records = map(Record.FromString, _records(path.read_bytes()))
    return max((record.history.step.num for record in records if record.HasField("history")), default=-1)


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the complete records of a .wandb file: chunks within blocks, up to the first that a kill has cut."""
    place, record = _HEADER_BYTES, b""
    while place + _HEADER_BYTES <= len(data):
        left = _BLOCK_BYTES - place % _BLOCK_BYTES
        if left < _HEADER_BYTES:  # what is left of a block is too small for a chunk's header
            place += left
            continue
        end = place + _HEADER_BYTES + int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        if end > len(data) or kind == 0:
            return
        record += data[place + _HEADER_BYTES : end]
        place = end
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""
