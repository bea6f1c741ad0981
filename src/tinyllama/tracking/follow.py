"""A follower: hands what is new in a run's files to one sink, each thing once, however often either is started.

Reads metrics.jsonl, events.jsonl and releases/; writes `RUN/trackers/SINK.json`: how far the sink has come, as far as
the sink holds it safely (`Sink.held`). What comes after that position is delivered again after a kill. Only the process
that holds `RUN/trackers/SINK.lock` follows: training's own tracker process or `tinyllama watch`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter

from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json
from tinyllama.recipe import Recipe
from tinyllama.tracking.tail import (
    Row,
    Scores,
    baseline_scores,
    is_shown,
    numeric_metrics,
    read_new_rows,
    release_scores,
    releases_state,
    time_of,
    timestamp_anchor,
)


class Sink(Protocol):
    """Where a run is shown. All calls come from one thread, may block and may raise."""

    def rows(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Show metrics: each row has `step` and numbers; `times` in seconds since 1970."""

    def events(self, events: Sequence[Row], losses: tuple[float, float] | None) -> None:
        """Show rows of events.jsonl, after the metrics; `losses`: the lowest and the highest so far."""

    def scores(self, row: Row, time: float) -> None:
        """Show a release's scores: `step`, `tokens` and numbers, as of when the step was made."""

    def baselines(self, baselines: dict[str, Scores]) -> None:
        """Show these baselines and no others."""

    def go_back(self, step: int) -> int | None:
        """Other numbers come for the steps after `step`: forget what can be forgotten.

        Returns the step after which rows must come, 0 where everything must come again, None where nothing can be
        forgotten: then rows go on after the newest that was shown.
        """

    def held(self, progress: "SinkPosition") -> "SinkPosition":
        """Return the position up to which everything shown outlasts a kill of this process.

        The follower saves it, and a new process continues from it.
        """

    def close(self) -> None:
        """Write what is not yet written."""


@dataclass
class SinkPosition:
    """How far a sink has come with a run."""

    step: int = 0
    """The newest that it has, or that was left out by `is_shown`."""
    events: int = 0
    """Bytes of events.jsonl."""
    anchors: list[tuple[int, float]] = field(default_factory=list)
    """Steps after the newest, or it, and when they were made."""
    clock: float = 0.0
    """When the newest step was made, as far as the files tell."""
    losses: tuple[float, float] | None = None
    """Lowest and highest so far."""
    differs: bool = False
    """The run went back, and does steps again with other numbers when it goes on."""
    scores: dict[str, Scores] = field(default_factory=dict)
    """Step of a release -> what is shown of it."""
    baselines: dict[str, Scores] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """The sink's own files with their bytes at this position, for sinks that cut off the rest."""


class RunTailer:
    """Follows a run for a sink; the caller holds the sink's lock in the run.

    `alive` is called before and after everything that is handed to the sink.
    """

    def __init__(self, run: Path, recipe: Recipe, name: str, sink: Sink, alive: Callable[[], None]) -> None:
        self.run, self.recipe, self.sink, self.alive = run, recipe, sink, alive
        self.path = progress_path(run, name)
        self.progress = read_progress(run, name)
        self.saved: dict[str, Any] = {}
        self.offset = 0
        """Bytes of metrics.jsonl that are read; from its beginning where the follower starts or the run goes on."""
        self.is_read_again = False
        """Whether metrics.jsonl is being read once more from its beginning, since a line was none."""
        self.releases: object = None

    def poll(self) -> None:
        """Show all that is new."""
        events = self._new_events()
        while self._show_rows():
            self.alive()
        if events:
            self.sink.events(events, self.progress.losses)
            self.alive()
        self._show_scores()
        self._save()
        self.alive()

    def close(self) -> None:
        """Close the sink and save the position: what the sink held back until now is safe."""
        self.sink.close()
        self.saved = {}
        self._save()

    def _new_events(self) -> list[Row]:
        """The new events; where they say that other numbers come, the sink has gone back."""
        found: list[Row] = []
        back = self.progress.step
        while (read := read_new_rows(self.run / "events.jsonl", self.progress.events))[0]:
            rows, self.progress.events = read
            found += rows
            back = min([back, *map(self._valid_through_step, rows)])
        if back == self.progress.step:
            return found
        kept = self.sink.go_back(back)
        self.alive()
        if kept == 0:
            self._forget()
            return self._new_events()
        self.progress.step = self.progress.step if kept is None else kept
        return found

    def _forget(self) -> None:
        """Begin with the run's first step and event."""
        self.progress, self.offset, self.releases = SinkPosition(), 0, None

    def _valid_through_step(self, event: Row) -> int:
        """The step after which an event says that other numbers come: when the run goes on, metrics.jsonl is cut."""
        progress, name = self.progress, event["event"]
        progress.anchors += filter(None, [timestamp_anchor(event)])
        if name == "rollback":
            progress.differs = True
        if name not in ("start", "resume"):
            return progress.step
        self.offset = 0
        differs = progress.differs or name == "start" or "changed" in event
        progress.differs = False
        return event["step"] if differs else progress.step

    def _show_rows(self) -> bool:
        """Show a chunk of the new rows; whether there were any lines."""
        try:
            rows, self.offset = read_new_rows(self.run / "metrics.jsonl", self.offset)
        except InputError:
            if self.is_read_again or self.offset == 0:
                raise
            self.offset, self.is_read_again = 0, True  # cut back and grown again since: it was the middle of a line
            return True
        self.is_read_again &= bool(rows)
        new = [row for row in rows if row["step"] > self.progress.step]  # the others were done again, to the same end
        timed = [(row, self._update_position(row)) for row in new]
        shown = [({"step": row["step"], **numeric_metrics(row)}, time) for row, time in timed if is_shown(row)]
        if shown:
            self.sink.rows([row for row, _ in shown], [time for _, time in shown])
        return bool(rows)

    def _update_position(self, row: Row) -> float:
        """Take a row into account; when it was made, as far as the files tell: events have a time, steps a speed."""
        progress, loss = self.progress, row.get("loss")
        progress.step = row["step"]
        if loss is not None:
            low, high = progress.losses or (loss, loss)
            progress.losses = (min(low, loss), max(high, loss))
        known = [time for step, time in progress.anchors if step < row["step"]]
        progress.anchors = [(step, time) for step, time in progress.anchors if step >= row["step"]]
        speed = row.get("tokens_per_second")
        progress.clock = max([progress.clock, *known]) + (self.recipe.train.batch_tokens / speed if speed else 0.0)
        return progress.clock

    def _show_scores(self) -> None:
        if self.releases == (state := releases_state(self.run)):
            return
        progress = self.progress
        for step, tokens, scores in release_scores(self.run):
            known = progress.scores.get(str(step), {})
            new = {metric: points for metric, points in scores.items() if known.get(metric) != points}
            if known.keys() & new.keys() and self.sink.go_back(0) == 0:  # scored anew: what is there would stay
                self._forget()
                self.poll()
                return
            if new:
                self.sink.scores({"step": step, "tokens": tokens, **new}, time_of(self.run, step))
                progress.scores[str(step)] = scores
        metrics = sorted({metric for scores in progress.scores.values() for metric in scores})
        baselines = baseline_scores(self.run, metrics)
        if baselines != progress.baselines:
            self.sink.baselines(baselines)
            progress.baselines = baselines
        self.releases = state

    def _save(self) -> None:
        state = asdict(self.progress)
        if state != self.saved:
            write_json(self.path, asdict(self.sink.held(self.progress)))
            self.saved = state


def read_progress(run: Path, name: str) -> SinkPosition:
    """How far a sink has come with a run: nowhere, where nothing was shown yet."""
    path = progress_path(run, name)
    return TypeAdapter(SinkPosition).validate_python(read_json(path)) if path.is_file() else SinkPosition()


def progress_path(run: Path, name: str) -> Path:
    """The file that says how far a sink has come with a run."""
    return run / "trackers" / f"{name}.json"
