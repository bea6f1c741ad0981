"""Sink for trackio. Its database `.trackio` is in the folder that contains the runs, so that one page shows all runs.

This module calls trackio's storage functions, and uses SQL in `_empty`, instead of `trackio.init`. `trackio.init`
requests the user's name from the hub, hides errors and writes from threads. Each storage function either commits or
raises. An open page does not show entries that are added later. Therefore all entries are created at the beginning: one
per baseline, and two for the vertical lines of releases and problems.
"""

import importlib
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from tinyllama.files import Row, reject_symlink, reject_symlinks
from tinyllama.recipe import Recipe
from tinyllama.runs.log import describe_event, event_kind, event_title
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import Scores, SinkPosition

PROJECT = "tinyllama"
MAX_ALERTS = 20
"""Maximum number of alerts per run. The newest alerts are kept, because the page lists only the 20 oldest alerts."""
_ALERT_COLUMNS = ("title", "text", "level", "step", "timestamp")
MAX_ANNOTATIONS = 50
"""Maximum number of vertical lines per entry. Above 500 points, the page downsamples and draws across gaps."""
SMOOTHING = 20
"""Number of points that the page's thick line averages; the thin line is not smoothed."""
_GAP = {"_type": "trackio.histogram"}
"""Value that interrupts a curve. The page draws nothing at an empty histogram, but connects points across missing
values."""
_BEGINNING = datetime.fromtimestamp(0, UTC).isoformat()
"""Creation time of all entries except the run's own entry; the page sorts and colours entries by creation time."""


def trackio_dir(run: RunDir) -> Path:
    """Return the folder of trackio's database, which contains this run and the other runs in the same folder."""
    return run.path.resolve().parent / ".trackio"


def open_trackio(folder: Path) -> Any:
    """Import trackio with its data in `folder`; its first import reads this path from the environment."""
    reject_symlink(folder)
    reject_symlinks(folder)
    os.environ["TRACKIO_DIR"] = str(folder)
    trackio = importlib.import_module("trackio")
    used = importlib.import_module("trackio.utils").TRACKIO_DIR
    if used != folder:
        raise RuntimeError(f"this process already uses trackio's data in {used}")
    return trackio


def is_on_network_filesystem(folder: Path) -> bool:
    """Return whether a folder is on a network disk, where SQLite supports no second writer."""
    return bool(open_trackio(folder).utils.is_network_filesystem(folder))


def create_baseline_runs(run: RunDir, names: Iterable[str]) -> None:
    """Create entries for baselines that may be scored later, so that a page opened now will show their scores."""
    storage = open_trackio(trackio_dir(run)).SQLiteStorage
    for name in names:
        _ensure_entry(storage, f"{run.name}/baseline/{name}", name)


def _ensure_entry(storage: Any, entry_id: str, name: str, created_at: str = _BEGINNING) -> None:
    """Create an entry without metrics, unless it exists."""
    run, kind, *_ = *entry_id.split("/"), ""
    config = {"_Group": f"{kind}s of {run}" if kind else "runs"}
    storage.bulk_log(PROJECT, name, [{"tokens": 0}], [0], [created_at], config, [f"{entry_id} begins"], run_id=entry_id)


class TrackioSink:
    """Sink for trackio's page, with entries for a run, for its annotations and for its baselines."""

    def __init__(self, run: RunDir, recipe: Recipe, position: SinkPosition) -> None:
        self.run, self.recipe = run.name, recipe
        self.alerts = f"{self.run}/alerts"
        self.storage = open_trackio(trackio_dir(run)).SQLiteStorage
        if position == SinkPosition():  # existing entries of this name belong to a deleted run
            self._clear()
        for kind in ("releases", "trouble"):
            _ensure_entry(self.storage, f"{self.run}/mark/{kind}", f"{kind} of {self.run}")

    def log_metrics(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Log rows of metrics, except rows that exist already."""
        config = self.recipe.model_dump(mode="json") | {"_Group": "runs"}
        self._log(self.run, self.run, rows, times, [f"{self.run} {row['step']}" for row in rows], config)

    def log_events(self, events: Sequence[Row], loss_range: tuple[float, float] | None) -> None:
        """Send problems as alerts, and draw annotated events as vertical lines on the loss curve."""
        self._alert([event for event in events if event_kind(event).level != "info"])
        marked = [event for event in events if event_kind(event).is_annotated]
        if loss_range:
            self._annotate("releases", [event for event in marked if event["event"] == "release"], loss_range)
            self._annotate("trouble", [event for event in marked if event["event"] != "release"], loss_range)

    def log_scores(self, row: Row, time: float) -> None:
        """Log a release's scores with the time of its step, because the page smooths scores that have another time."""
        self._log(self.run, self.run, [row], [time], [f"{self.run} {sorted(row.items())}"])

    def set_baselines(self, baselines: dict[str, Scores]) -> None:
        """Draw each baseline as an entry whose scores are flat lines from the first to the last step."""
        self._empty(self._records("baseline"))
        steps, batch = (0, self.recipe.train.steps), self.recipe.train.batch_tokens
        for name, scores in baselines.items():
            run_id = f"{self.run}/baseline/{name}"
            _ensure_entry(self.storage, run_id, name)
            rows = [{"step": step, "tokens": step * batch, **scores} for step in steps]
            self._log(name, run_id, rows, [0.0, 0.0], [f"{run_id} {step}" for step in steps])

    def rewind(self, step: int) -> int:
        """Delete the metrics of all entries; keep the entries, because an open page does not show new entries."""
        self.storage.delete_run(PROJECT, "", run_id=self.alerts)
        self._empty(self._records())
        return 0

    def durable_position(self, position: SinkPosition) -> SinkPosition:
        """Return `position` unchanged, since each call commits."""
        return position

    def close(self) -> None:
        """Do nothing, because each call has committed."""

    def _alert(self, events: Sequence[Row]) -> None:
        """Add alerts to a separate entry, since trackio deletes alerts only together with their entry."""
        new = [
            {
                "title": f"{event_title(event)} of {self.run}",
                "text": describe_event(event),
                "level": event_kind(event).level,
                "step": event["step"],
                "timestamp": _isoformat(event["time"]),
            }
            for event in events
        ]
        there = self.storage.get_alerts(PROJECT, run_id=self.alerts) if new else []
        known = {(alert["title"], alert["timestamp"]) for alert in there}  # sent before a restart
        new = [alert for alert in new if (alert["title"], alert["timestamp"]) not in known]
        kept = sorted([*there, *new], key=itemgetter("timestamp"))[-MAX_ALERTS:]
        if new:
            self.storage.delete_run(PROJECT, "", run_id=self.alerts)
            columns = {f"{name}s": [alert[name] for alert in kept] for name in _ALERT_COLUMNS}
            self.storage.bulk_alert(PROJECT, self.run, **columns, run_id=self.alerts)

    def _annotate(self, kind: str, events: Sequence[Row], losses: tuple[float, float]) -> None:
        """Add vertical lines at these events; keep only the newest MAX_ANNOTATIONS lines."""
        run_id, batch = f"{self.run}/mark/{kind}", self.recipe.train.batch_tokens
        new = [
            {"step": event["step"], "tokens": event["step"] * batch, "mark": f"{event['event']} {number}"} | point
            for event in events
            for number, point in enumerate(_vertical_line_points(*losses))
        ]
        there = [row for row in self.storage.get_logs(PROJECT, run_id=run_id) if "mark" in row] if new else []
        rows = [*there, *new][-len(_vertical_line_points(*losses)) * MAX_ANNOTATIONS :]
        if len(rows) < len(there) + len(new):
            self._empty(self._records(f"mark/{kind}"))
        keys = [f"{run_id} {row['step']} {row['mark']}" for row in rows]
        self._log(f"{kind} of {self.run}", run_id, rows, [0.0] * len(rows), keys)

    def _log(
        self,
        name: str,
        run_id: str,
        rows: Iterable[Row],
        times: Iterable[float],
        keys: list[str],
        config: dict[str, Any] | None = None,
    ) -> None:
        rows = list(rows)
        metrics = [{key: value for key, value in row.items() if key not in ("step", "timestamp")} for row in rows]
        steps, stamps = [row["step"] for row in rows], list(map(_isoformat, times))
        self.storage.bulk_log(PROJECT, name, metrics, steps, stamps, config, keys, run_id=run_id)

    def _clear(self) -> None:
        """Delete all entries of the run, including entries that other programs wrote."""
        for run_id in [self.alerts, *(record["id"] for record in self._records())]:
            self.storage.delete_run(PROJECT, "", run_id=run_id)
        while self.storage.delete_run(PROJECT, self.run):
            pass

    def _empty(self, records: Iterable[dict[str, str]]) -> None:
        """Delete all metrics of the given entries except each entry's first row.

        The first row preserves the entry: an open page does not show an entry that was deleted and created again. This
        function uses SQL, because trackio's storage can only delete complete entries.
        """
        database = self.storage.get_project_db_path(PROJECT)
        for record in records:
            _ensure_entry(self.storage, record["id"], record["name"], record["created_at"])
            own = (record["id"], f"{record['id']} begins")
            with self.storage._get_process_lock(PROJECT), self.storage._get_connection(database) as connection:
                connection.execute("DELETE FROM metrics WHERE run_id = ? AND log_id IS NOT ?", own)

    def _records(self, kind: str = "") -> list[dict[str, str]]:
        """Return the entries of a kind, such as `mark/releases`, or all entries of the run if no kind is given."""
        found: list[dict[str, str]] = self.storage.get_run_records(PROJECT)
        return [record for record in found if f"{record['id']}/".startswith(f"{self.run}/{kind}")]


def _vertical_line_points(low: float, high: float) -> list[Row]:
    """Return the points of a vertical line and a gap; empty rows prevent smoothing from moving the line's ends."""
    padding: list[Row] = [{}] * (SMOOTHING // 2)
    return [{"loss": low}, *padding, {"loss": high}, {"loss": _GAP}, *padding]


def _isoformat(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
