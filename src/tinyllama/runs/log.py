"""The log of a run: a row per step in metrics.jsonl, per event in events.jsonl, per evaluation in evaluations.jsonl.

`RunLog` appends rows. `RunDir` and trackers read the rows. `EVENT_KINDS` lists the kinds of events.
"""

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tinyllama.files import atomic_write, last_rows, open_without_following
from tinyllama.formatting import format_duration_precise
from tinyllama.runs.run_dir import RunDir
from tinyllama.runs.samples import current_samples

Event = Mapping[str, Any]
Category = Literal["release", "interruption", "problem", "info"]
RELEASE: Category = "release"
INTERRUPTION: Category = "interruption"
PROBLEM: Category = "problem"
INFO: Category = "info"


@dataclass(frozen=True)
class EventKind:
    """Category and presentation of a kind of event."""

    category: Category
    """Release, interruption of training, problem, or other information."""
    level: Literal["info", "warn", "error"]
    """Severity in the trackers' lists of alerts."""
    is_lifecycle: bool = False
    """Whether the event changes the state of the run: active, ended or failed."""


EVENT_KINDS = {
    "start": EventKind(INFO, "info", is_lifecycle=True),
    "resume": EventKind(INTERRUPTION, "info", is_lifecycle=True),
    "signal": EventKind(INTERRUPTION, "warn", is_lifecycle=True),
    "interrupted": EventKind(INTERRUPTION, "warn", is_lifecycle=True),
    "done": EventKind(INFO, "info", is_lifecycle=True),
    "failed": EventKind(PROBLEM, "error", is_lifecycle=True),
    "hang": EventKind(PROBLEM, "error", is_lifecycle=True),
    "rank-lost": EventKind(PROBLEM, "error", is_lifecycle=True),
    "skip": EventKind(PROBLEM, "warn"),
    "rollback": EventKind(PROBLEM, "warn"),
    "checkpoint": EventKind(INFO, "info"),
    "checkpoint-failed": EventKind(PROBLEM, "error"),
    "checkpoint-damaged": EventKind(PROBLEM, "error"),
    "metrics-damaged": EventKind(PROBLEM, "warn"),
    "release": EventKind(RELEASE, "info"),
    "sample": EventKind(INFO, "info"),
    "release-failed": EventKind(PROBLEM, "error"),
    "tracker-failed": EventKind(PROBLEM, "warn"),
    "tracker-blocked": EventKind(PROBLEM, "warn"),
}
"""All kinds of events that training, releases and trackers write, by name."""
_CHUNK_BYTES = 1 << 20
_REPEATED_BYTES = 1 << 22
"""Size of the end of events.jsonl in which repeated samples are found. Earlier samples are appended again, and readers
keep the newest."""
_COMMON_FIELDS = ("time", "event", "step")


def event_kind(event: Event) -> EventKind:
    """Return the kind of an event; an unknown event, which another version wrote, has the category `info`."""
    return EVENT_KINDS.get(event["event"], EventKind(INFO, "info"))


def event_category(event: Event) -> Category:
    """Return the category of an event."""
    return event_kind(event).category


def event_title(event: Event) -> str:
    """Return the name and step of an event, such as `rollback at step 1,200`."""
    return f"{event['event']} at step {event['step']:,}"


def describe_event(event: Event) -> str:
    """Return the details of an event: all fields except its name, step and time."""
    details = {name: value for name, value in event.items() if name not in _COMMON_FIELDS and value is not None}
    return "; ".join(_format_detail(name, value) for name, value in details.items())


def event_text(event: Event) -> str:
    """Return the title and the details of an event."""
    details = describe_event(event)
    return event_title(event) + (f": {details}" if details else "")


def _format_detail(name: str, value: Any) -> str:
    label = name.removesuffix("_seconds").replace("_", " ")
    if name.endswith("seconds"):
        return f"{'took' if name == 'seconds' else label} {format_duration_precise(value)}"
    if name in ("reason", "problem", "signal", "folder"):
        return str(value)
    if isinstance(value, list):
        return f"{label}: {', '.join(map(str, value))}"
    return f"{label} {value}"


class RunLog:
    """Thread-safe log of a run's metrics, events and evaluations; each line is written immediately.

    With `survives_full_disk`, lines are kept in memory while the disk is full. A later call writes these lines when the
    disk has space again.
    """

    def __init__(self, run: RunDir, survives_full_disk: bool = False, clock: Callable[[], float] = time.time) -> None:
        self.run, self.survives_full_disk, self.clock = run, survives_full_disk, clock
        self.pending: dict[Path, bytes] = dict.fromkeys((run.metrics_path, run.events_path, run.evaluations_path), b"")
        self.lock = threading.Lock()
        self.step = 0
        """Newest step with a row."""
        self.logged_samples: list[dict[str, Any]] | None = None
        """Samples that the run logged before it resumed; None before they are read."""

    def truncate_after(self, step: int) -> None:
        """Delete the metrics and evaluations after `step`, so that no step has two rows after the run resumes.

        If deleted rows of metrics were invalid or repeated a step, a `metrics-damaged` event reports their lines.
        """
        self.step, self.logged_samples, damaged = step, None, list[int]()
        rows = self.run.metrics(step, damaged)
        with atomic_write(self.run.metrics_path) as file:
            file.writelines(map(_line, rows))
        if self.run.evaluations_path.is_file():
            kept = [row for row in self.run.evaluations() if row["step"] <= step]
            with atomic_write(self.run.evaluations_path) as file:
                file.writelines(map(_line, kept))
        if damaged:
            problem = f"{self.run.metrics_path}: deleted damaged rows, line {', '.join(map(str, damaged))}"
            self.event("metrics-damaged", step, problem=problem)

    def drop_partial_lines(self) -> None:
        """Delete an incomplete last line, which a crash can leave, so that the next row begins on a new line."""
        for path in self.pending:
            if path.is_file():
                with open_without_following(path) as file:
                    file.truncate(_size_of_lines(path))

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append a step's row of metrics."""
        self._append(self.run.metrics_path, row)
        self.step = row["step"]

    def event(self, name: str, step: int, **details: Any) -> None:
        """Append an event, whose name is in EVENT_KINDS, with the current time in seconds since 1970."""
        assert name in EVENT_KINDS, name
        self._append(self.run.events_path, {"time": self.clock(), "event": name, "step": step, **details})

    def samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Append an event per sample of a step, each with `prompt`, `greedy` and `sampled`.

        After a kill, repeated steps have the same samples, which are not appended again.
        """
        if self.logged_samples is None:
            events = current_samples(last_rows(self.run.events_path, _REPEATED_BYTES))
            self.logged_samples = [{name: event[name] for name in event if name != "time"} for event in events]
        for sample in samples:
            if {"event": "sample", "step": step, **sample} not in self.logged_samples:
                self.event("sample", step, **sample)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Append an evaluation: the fields of `evaluate.results.Evaluation`."""
        self._append(self.run.evaluations_path, row)

    def flush_to_disk(self) -> None:
        """Flush all files to the disk (fsync). Raises OSError if the disk is too full for the pending lines."""
        for path in self.pending:
            with self.lock:
                self._write_pending(path)
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        with self.lock:
            self.pending[path] += _line(row)
            try:
                self._write_pending(path)
            except OSError as error:
                if not (self.survives_full_disk and error.errno == errno.ENOSPC):
                    raise

    def _write_pending(self, path: Path) -> None:
        """Write all pending lines of a file, or none of them, so that no line is left incomplete."""
        if not self.pending[path]:
            return
        size = path.stat().st_size if path.is_file() else 0
        try:
            with open_without_following(path) as file:
                written = file.write(self.pending[path])
            if written != len(self.pending[path]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if path.is_file():
                os.truncate(path, size)
            raise OSError(error.errno, error.strerror, str(path)) from None  # the error for a full disk names no file
        self.pending[path] = b""


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _size_of_lines(path: Path) -> int:
    """Return the total size in bytes of a file's complete lines."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = file.seek(max(0, end - _CHUNK_BYTES))
            if found := file.read(end - start).rfind(b"\n") + 1:
                return start + found
            end = start
    return 0
