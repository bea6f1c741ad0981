"""Follower of a run, which delivers the metrics, events and scores in the run's files to a sink.

`RUN/trackers/SINK.json` records the position in these files up to which the sink has stored all data permanently. If
the process is killed, the next process delivers the data after that position again. Only the process that holds
`RUN/trackers/SINK.lock` follows the run. This module does not import torch.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter

from tinyllama.errors import InputError
from tinyllama.evaluate.results import task_score
from tinyllama.files import Row, read_json_if_exists, rows_since, write_json
from tinyllama.runs.run_dir import RunDir

Scores = dict[str, float]
"""Scores in percent, by metric, such as `scores/hellaswag acc_norm` -> 45.7."""

_HELLASWAG = "scores/hellaswag acc_norm"
"""Metric of the published baseline scores."""
FULL_RESOLUTION_STEPS = 10_000
"""Number of steps up to which every step is shown. Up to twice this number, every second step is shown; up to four
times this number, every fourth step. Each doubling adds 5,000 rows, so 1.4 million steps give 46,000 rows."""


class Sink(Protocol):
    """Destination that displays a run. All methods are called from one thread; they may block or raise."""

    def log_metrics(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Show rows of metrics (`step` and numbers) with their times in seconds since 1970."""

    def log_events(self, events: Sequence[Row]) -> None:
        """Show events whose metrics were shown before."""

    def log_scores(self, row: Row, time: float) -> None:
        """Show a release's scores (`step`, `tokens` and numbers) with the time of the release's step."""

    def set_baselines(self, baselines: dict[str, Scores]) -> None:
        """Show these baselines and remove all others."""

    def rewind(self, step: int) -> int | None:
        """Delete the rows after step `step`, because the values in these rows will change.

        Returns the step after which rows must be delivered again: 0 for all rows. Returns None if the sink cannot
        delete anything; delivery then continues after the newest step that was shown.
        """

    def durable_position(self, position: "SinkPosition") -> "SinkPosition":
        """Return the position up to which all shown data remains stored if this process is killed.

        The follower saves the position, and a new process continues from there.
        """

    def close(self) -> None:
        """Write pending data and close."""


@dataclass
class SinkPosition:
    """Position up to which a sink has received a run's data."""

    step: int = 0
    """Newest step that the sink has received or that `is_shown` has skipped."""
    events: int = 0
    """Offset in the events file, in bytes."""
    anchors: list[tuple[int, float]] = field(default_factory=list)
    """Known times of steps, taken from events: pairs of a step and its time in seconds since 1970. Pairs that are no
    longer needed are removed."""
    clock: float = 0.0
    """Estimated time of the newest step, in seconds since 1970."""
    differs: bool = False
    """Whether the run was rolled back, so that repeated steps get different values."""
    scores: dict[str, Scores] = field(default_factory=dict)
    """Scores that the sink shows, by the step of their release."""
    baselines: dict[str, Scores] = field(default_factory=dict)
    """Scores of the baselines that the sink shows."""
    files: dict[str, int] = field(default_factory=dict)
    """Sizes in bytes of the sink's files at this position, for sinks that truncate their files after a kill."""


def read_position(run: RunDir, sink: str) -> SinkPosition:
    """Return the saved position of a sink in a run, or, if none is saved, the position at the run's beginning."""
    return TypeAdapter(SinkPosition).validate_python(read_json_if_exists(run.tracker_position_path(sink)) or {})


class RunFollower:
    """Follower of a run for a sink; the caller holds the sink's lock in the run.

    `alive` is called before and after each call to the sink.
    """

    def __init__(self, run: RunDir, name: str, sink: Sink, alive: Callable[[], None] = lambda: None) -> None:
        self.run, self.sink, self.alive = run, sink, alive
        self.batch_tokens = run.recipe().train.batch_tokens
        self.path = run.tracker_position_path(name)
        self.position = read_position(run, name)
        self.saved: dict[str, Any] = {}
        self.offset = 0
        """Offset in the metrics file, in bytes; 0 when the follower starts and when the run resumes."""
        self.is_reread = False
        """Whether the metrics are being read again from their beginning because a line was invalid."""
        self.score_files: list[tuple[str, int, int]] = []
        """Names, times and sizes of the score files when they were last read."""

    def poll(self) -> None:
        """Deliver all new rows, events and scores to the sink."""
        events = self._read_events()
        while self._show_metrics():
            self.alive()
        if events:
            self.sink.log_events(events)
            self.alive()
        self._show_scores()
        self._save()
        self.alive()

    def close(self) -> None:
        """Close the sink and save the position, up to which all items are now stored permanently."""
        self.sink.close()
        self.saved = {}
        self._save()

    def _read_events(self) -> list[Row]:
        """Return the new events; if values that the sink shows will change, rewind the sink first."""
        found: list[Row] = []
        valid_step = self.position.step
        while True:
            events, self.position.events = rows_since(self.run.events_path, self.position.events)
            if not events:
                break
            found += events
            valid_step = min([valid_step, *map(self._valid_through_step, events)])
        if valid_step == self.position.step:
            return found
        kept_step = self.sink.rewind(valid_step)
        self.alive()
        if kept_step == 0:
            self._reset()
            return self._read_events()
        if kept_step is not None:
            self.position.step = kept_step
        return found

    def _reset(self) -> None:
        self.position, self.offset, self.score_files = SinkPosition(), 0, []

    def _valid_through_step(self, event: Row) -> int:
        """Return the step up to which the values that the sink shows remain valid after an event.

        A run that starts or resumes truncates its metrics file, so the follower then reads the file from its beginning.
        """
        position, name = self.position, event["event"]
        if anchor := _timestamp_anchor(event):
            position.anchors.append(anchor)
        if name == "rollback":
            position.differs = True
        if name not in ("start", "resume"):
            return position.step
        self.offset = 0
        differs = position.differs or name == "start" or "changed" in event
        position.differs = False
        return int(event["step"]) if differs else position.step

    def _show_metrics(self) -> bool:
        """Show the next rows of metrics; return whether the file had new rows, including rows that are not shown."""
        try:
            rows, self.offset = rows_since(self.run.metrics_path, self.offset)
        except InputError:
            if self.is_reread or self.offset == 0:
                raise
            self.offset, self.is_reread = 0, True  # the file was rewritten, and the offset was within a line
            return True
        self.is_reread &= bool(rows)
        new = [row for row in rows if row["step"] > self.position.step]  # rows up to this step are processed already
        timed = [(row, self._advance(row)) for row in new]
        shown = [({"step": row["step"], **_numeric_metrics(row)}, time) for row, time in timed if is_shown(row)]
        if shown:
            self.sink.log_metrics([row for row, _ in shown], [time for _, time in shown])
        return bool(rows)

    def _advance(self, row: Row) -> float:
        """Move the position to a row; return the row's time, estimated from the events and the throughput."""
        position = self.position
        position.step = row["step"]
        passed = [time for step, time in position.anchors if step < row["step"]]
        position.anchors = [(step, time) for step, time in position.anchors if step >= row["step"]]
        speed = row.get("tokens_per_second")
        position.clock = max([position.clock, *passed]) + (self.batch_tokens / speed if speed else 0.0)
        return position.clock

    def _show_scores(self) -> None:
        paths = self.run.releases.files_with_scores()
        score_files = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
        if score_files == self.score_files:
            return
        position = self.position
        for step, tokens, scores in _release_scores(self.run):
            known = position.scores.get(str(step), {})
            new = {metric: points for metric, points in scores.items() if known.get(metric) != points}
            # the release was scored again, so its old scores must be deleted
            if known.keys() & new.keys() and self.sink.rewind(0) == 0:
                self._reset()
                self.poll()
                return
            if new:
                self.sink.log_scores({"step": step, "tokens": tokens, **new}, _time_of_step(self.run, step))
                position.scores[str(step)] = scores
        metrics = sorted({metric for scores in position.scores.values() for metric in scores})
        baselines = _baseline_scores(self.run, metrics)
        if baselines != position.baselines:
            self.sink.set_baselines(baselines)
            position.baselines = baselines
        self.score_files = score_files

    def _save(self) -> None:
        state = asdict(self.position)
        if state != self.saved:
            write_json(self.path, asdict(self.sink.durable_position(self.position)))
            self.saved = state


def is_shown(row: Row) -> bool:
    """Return whether a row of metrics is passed to the sinks (see FULL_RESOLUTION_STEPS).

    Rows with a validation result or an evaluation, and rows of skipped steps, are always passed.
    """
    step = row["step"]
    stride = 1 << max(0, (step - 1) // FULL_RESOLUTION_STEPS).bit_length()
    if step % stride == 0 or "validation_loss" in row or "skipped" in row:
        return True
    return any(name.startswith("evaluation/") for name in row)


def _numeric_metrics(row: Row) -> dict[str, float]:
    """Return the numbers of a row except its step, with memory in gigabytes for short axis labels."""
    found = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
    if "memory_bytes" in found:
        found["memory_gigabytes"] = found.pop("memory_bytes") / 1e9
    return found


def _timestamp_anchor(event: Row) -> tuple[int, float] | None:
    """Return an event's step and the time of this step, or None if the event may be much later than the step."""
    if event["event"] in ("start", "resume", "checkpoint"):
        return event["step"], event["time"] - event.get("seconds", 0.0)
    return None


def _time_of_step(run: RunDir, step: int) -> float:
    """Return the time of a step in seconds since 1970, interpolated between events; 0 without events."""
    times = {0: 0.0} | dict(filter(None, map(_timestamp_anchor, run.events())))
    steps = sorted(times)
    return float(np.interp(step, steps, [times[anchor] for anchor in steps]))


def _release_scores(run: RunDir) -> Iterator[tuple[int, int, Scores]]:
    """Yield the step, tokens and scores of each release that has scores."""
    for release, metadata in run.releases.releases():
        if evaluation := release.evaluation():
            yield metadata["step"], metadata["tokens"], _scores(evaluation)


def _baseline_scores(run: RunDir, metrics: Collection[str]) -> dict[str, Scores]:
    """Return the baselines' scores for the given metrics: measured scores first, then published scores."""
    found = {evaluation["model"]: _scores(evaluation) for evaluation in run.releases.baseline_evaluations()}
    for row in run.releases.table()["baselines"]:
        if row["source"] and row["source"].startswith("published"):
            found[_published_name(row["name"])] = {_HELLASWAG: row["hellaswag"]}
    kept = {name: {key: scores[key] for key in metrics if key in scores} for name, scores in found.items()}
    return {name: scores for name, scores in kept.items() if scores}


def _published_name(name: str) -> str:
    """Return a published model's name for trackers, without the step, because only the model's last step is shown."""
    return f"{name.split(' step ', maxsplit=1)[0]} (published)"


def _scores(evaluation: Row) -> Scores:
    """Return the score of each task of an evaluation, by task and metric."""
    found: Scores = {}
    for task, row in evaluation["rows"].items():
        if score := task_score(row):
            found[f"scores/{task} {score.metric}"] = score.value
    return found
