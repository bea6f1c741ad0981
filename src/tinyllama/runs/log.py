"""The log of a run: appends rows to metrics.jsonl, one per step, and events to events.jsonl.

The two files are the record of a run. `RunDir` and trackers read them.
"""

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinyllama.files import atomic_write, open_without_following
from tinyllama.runs.events import EVENT_KINDS
from tinyllama.runs.run_dir import RunDir


class RunLog:
    """Log of a run's metrics and events, for any thread; each line is written immediately.

    With `survives_full_disk`, lines that cannot be written to a full disk are kept in memory. These lines are written
    together with a later line, as soon as there is space.
    """

    def __init__(self, run: RunDir, survives_full_disk: bool = False, clock: Callable[[], float] = time.time) -> None:
        self.run, self.survives_full_disk, self.clock = run, survives_full_disk, clock
        self.pending: dict[Path, bytes] = {run.metrics_path: b"", run.events_path: b""}
        self.lock = threading.Lock()
        self.step = 0
        """Newest step with a row."""

    def truncate_after(self, step: int) -> None:
        """Delete the metrics after a step, so that no step has two rows after the run resumes from it.

        If any of the deleted lines is invalid, an event reports the numbers of these lines.
        """
        self.step, damaged = step, list[int]()
        rows = self.run.metrics(step, damaged)
        with atomic_write(self.run.metrics_path) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        if damaged:
            problem = f"{self.run.metrics_path}: deleted damaged rows, line {', '.join(map(str, damaged))}"
            self.event("metrics-damaged", step, problem=problem)

    def drop_partial_lines(self) -> None:
        """Delete an incomplete last line, which a crash can leave, so that the next row begins on a new line."""
        for path in self.pending:
            if path.is_file():
                with open_without_following(path) as file:
                    file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append a step's row."""
        self._append(self.run.metrics_path, row)
        self.step = row["step"]

    def event(self, name: str, step: int, **details: Any) -> None:
        """Append an event of EVENT_KINDS, with its time in seconds since 1970."""
        assert name in EVENT_KINDS, name
        self._append(self.run.events_path, {"time": self.clock(), "event": name, "step": step, **details})

    def flush_to_disk(self) -> None:
        """Flush both files to the disk (fsync). Raises OSError if there is still no space for pending lines."""
        for path in self.pending:
            with self.lock:
                self._write_pending(path)
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        with self.lock:
            self.pending[path] += json.dumps(row).encode() + b"\n"
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
            raise OSError(error.errno, error.strerror, str(path)) from None  # the error of a full disk names no file
        self.pending[path] = b""
