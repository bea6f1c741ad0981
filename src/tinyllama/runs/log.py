"""What a run says of itself: metrics.jsonl and events.jsonl.

A row of metrics a step, an event for what is not a step. The files are the record; trackers read them (`track/`), and
so does everything else that shows a run.
"""

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from tinyllama.errors import InputError
from tinyllama.files import atomic_write, open_without_following


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a jsonl file, one at a time; none where there is no file, and no last line that was cut off.

    Raises InputError, naming the line, for one that is no row.
    """
    for number, line in _whole_lines(path):
        row = _parsed(line)
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: not a row of JSON; correct or delete the line")
        yield row


def read_metrics_up_to(path: Path, step: int, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl up to a step; append to `damaged` the numbers of later lines that are no rows.

    Raises InputError, naming the line, for one up to that step that is no row with its step.
    """
    is_reached = step == 0
    for number, line in _whole_lines(path):
        row = _parsed(line)
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            if not is_reached:
                raise InputError(f"{path}:{number}: not a row of metrics with its step; correct or delete the line")
            if damaged is not None:
                damaged.append(number)
            continue
        is_reached = is_reached or row["step"] >= step
        if row["step"] <= step:
            yield row


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield number, line


def _parsed(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except ValueError:
        pass
    try:
        return json.loads(line)  # which writes, and reads, NaN
    except ValueError:
        return None


class RunLog:
    """Appends to a run's metrics.jsonl and events.jsonl, each line flushed as it is written; also from threads.

    With `outlasts_full_disk`, what finds no room waits in memory and is written with the next line that does.
    """

    def __init__(self, run: Path, outlasts_full_disk: bool = False, clock: Callable[[], float] = time.time) -> None:
        self.metrics_path, self.events_path = run / "metrics.jsonl", run / "events.jsonl"
        self.outlasts_full_disk, self.clock = outlasts_full_disk, clock
        self.waiting: dict[Path, bytes] = {self.metrics_path: b"", self.events_path: b""}
        self.lock = threading.Lock()
        self.step = 0
        """The newest step with a row."""

    def truncate_after(self, step: int) -> None:
        """Delete the metrics after `step`, so that no step is there twice when the run resumes from it.

        A damaged row among them is an event and goes too.
        """
        self.step, damaged = step, list[int]()
        rows = read_metrics_up_to(self.metrics_path, step, damaged)
        with atomic_write(self.metrics_path) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        if damaged:
            lines = ", ".join(map(str, damaged))
            self.event("metrics-damaged", step, problem=f"{self.metrics_path}: deleted damaged rows, line {lines}")

    def drop_partial_lines(self) -> None:
        """Drop a last line that a crash has cut off, so that what is appended next begins a line of its own."""
        for path in (self.metrics_path, self.events_path):
            if path.is_file():
                with open_without_following(path) as file:
                    file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append a step's row."""
        self._append(self.metrics_path, row)
        self.step = row["step"]

    def event(self, name: str, step: int, **details: Any) -> None:
        """Append an event: what happened at which step, and when (seconds since 1970)."""
        self._append(self.events_path, {"time": self.clock(), "event": name, "step": step, **details})

    def flush_to_disk(self) -> None:
        """Make what was written outlast a power cut. OSError where something still finds no room."""
        for path in (self.metrics_path, self.events_path):
            with self.lock:
                self._flush_pending(path)
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        with self.lock:
            self.waiting[path] += json.dumps(row).encode() + b"\n"
            try:
                self._flush_pending(path)
            except OSError as error:
                if not (self.outlasts_full_disk and error.errno == errno.ENOSPC):
                    raise

    def _flush_pending(self, path: Path) -> None:
        """All of it or nothing, so that no line stands half."""
        if not self.waiting[path]:
            return
        size = path.stat().st_size if path.is_file() else 0
        try:
            with open_without_following(path) as file:
                written = file.write(self.waiting[path])
            if written != len(self.waiting[path]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if path.is_file():
                os.truncate(path, size)
            raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk's names no file
        self.waiting[path] = b""
