"""trackio's page as a sink: its database lies beside the runs (`.trackio`), so that one page compares them.

Written through its storage (but for `Page._empty`) and not through `trackio.init`: that one asks the hub who the user
is, swallows what goes wrong and writes from threads, where this commits each call or raises. An open page does not tick
what comes later, so releases and trouble are upright lines of two entries that are there from the beginning, and so
are baselines.
"""

import importlib
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from tinyllama.files import reject_symlink
from tinyllama.recipe import Recipe
from tinyllama.runs.events import describe_event, event_kind, event_title
from tinyllama.runs.jsonl import Row
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import Scores, SinkPosition

PROJECT = "tinyllama"
ALERTS = 20
"""Of a run at most, the newest: the page lists the 20 oldest of those that there are."""
_ALERT = ("title", "text", "level", "step", "timestamp")
MAX_ANNOTATIONS = 50
"""Of an entry at most, the newest: the page thins out lines of 500 points, and would draw over the gaps."""
SMOOTHING = 20
"""Points that the page's thick line is a mean of; the thin one is raw."""
_GAP = {"_type": "trackio.histogram"}
"""Ends a line: an empty histogram reaches the page and is no number. Over what does not reach it, it draws on."""
_BEGINNING = datetime.fromtimestamp(0, UTC).isoformat()
"""When all that stands beside a run began: the page lists and colours runs by when they began, newest first."""


def trackio_dir(run: RunDir) -> Path:
    """Return the folder in which trackio keeps this run and those in the same folder."""
    return run.path.resolve().parent / ".trackio"


def open_trackio(folder: Path) -> Any:
    """Import trackio with its data in `folder`: it reads where from the environment, when first imported."""
    reject_symlink(folder)
    os.environ["TRACKIO_DIR"] = str(folder)
    trackio = importlib.import_module("trackio")
    is_there = importlib.import_module("trackio.utils").TRACKIO_DIR
    if is_there != folder:
        raise RuntimeError(f"this process has trackio's data in {is_there} already")
    return trackio


def is_on_network_filesystem(folder: Path) -> bool:
    """Whether trackio's database in this folder would lie on a network disk, where SQLite bears no second writer."""
    return bool(open_trackio(folder).utils.is_network_filesystem(folder))


def create_baseline_runs(run: RunDir, names: Iterable[str]) -> None:
    """Have entries for baselines whose scores may come: a page that is opened from now on will show them."""
    storage = open_trackio(trackio_dir(run)).SQLiteStorage
    for name in names:
        _ensure_run(storage, f"{run.name}/baseline/{name}", name)


def _ensure_run(storage: Any, run_id: str, name: str, created_at: str = _BEGINNING) -> None:
    """Have an entry without metrics, once."""
    run, kind, *_ = *run_id.split("/"), ""
    config = {"_Group": f"{kind}s of {run}" if kind else "runs"}
    storage.bulk_log(PROJECT, name, [{"tokens": 0}], [0], [created_at], config, [f"{run_id} begins"], run_id=run_id)


class TrackioSink:
    """A run on trackio's page."""

    def __init__(self, run: RunDir, recipe: Recipe, position: SinkPosition) -> None:
        self.run, self.recipe = run.name, recipe
        self.alerts = f"{self.run}/alerts"
        self.storage = open_trackio(trackio_dir(run)).SQLiteStorage
        if position == SinkPosition():  # what is there under this name is of a run that is no more
            self._clear()
        for kind in ("releases", "trouble"):
            _ensure_run(self.storage, f"{self.run}/mark/{kind}", f"{kind} of {self.run}")

    def log_metrics(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Show metrics; one that is there already is left as it is."""
        config = self.recipe.model_dump(mode="json") | {"_Group": "runs"}
        self._log(self.run, self.run, rows, times, [f"{self.run} {row['step']}" for row in rows], config)

    def log_events(self, events: Sequence[Row], loss_range: tuple[float, float] | None) -> None:
        """What went wrong to the page's alerts, since their list opens over the charts; marks to the loss."""
        self._alert([event for event in events if event_kind(event).level != "info"])
        marked = [event for event in events if event_kind(event).is_annotated]
        if loss_range:
            self._mark("releases", [event for event in marked if event["event"] == "release"], loss_range)
            self._mark("trouble", [event for event in marked if event["event"] != "release"], loss_range)

    def log_scores(self, row: Row, time: float) -> None:
        """Show a release's scores at its tokens; among the rows of its time, or the page would smooth scores."""
        self._log(self.run, self.run, [row], [time], [f"{self.run} {sorted(row.items())}"])

    def set_baselines(self, baselines: dict[str, Scores]) -> None:
        """A run each, whose scores are flat lines from no tokens to the run's last."""
        self._empty(self._records("baseline"))
        steps, batch = (0, self.recipe.train.steps), self.recipe.train.batch_tokens
        for name, scores in baselines.items():
            run_id = f"{self.run}/baseline/{name}"
            _ensure_run(self.storage, run_id, name)
            rows = [{"step": step, "tokens": step * batch, **scores} for step in steps]
            self._log(name, run_id, rows, [0.0, 0.0], [f"{run_id} {step}" for step in steps])

    def rewind(self, step: int) -> int:
        """All rows come again, scores and marks among them. Entries stay, or the page would untick them."""
        self.storage.delete_run(PROJECT, "", run_id=self.alerts)
        self._empty(self._records())
        return 0

    def durable_position(self, position: SinkPosition) -> SinkPosition:
        """Return the position itself, since each call commits."""
        return position

    def close(self) -> None:
        """Nothing waits."""

    def _alert(self, events: Sequence[Row]) -> None:
        """Add to the alerts; in a run of their own, since trackio's storage takes them out with their run alone."""
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
        known = {(alert["title"], alert["timestamp"]) for alert in there}  # from before a kill that forgot them
        new = [alert for alert in new if (alert["title"], alert["timestamp"]) not in known]
        kept = sorted([*there, *new], key=itemgetter("timestamp"))[-ALERTS:]
        if new:
            self.storage.delete_run(PROJECT, "", run_id=self.alerts)
            columns = {f"{name}s": [alert[name] for alert in kept] for name in _ALERT}
            self.storage.bulk_alert(PROJECT, self.run, **columns, run_id=self.alerts)

    def _mark(self, kind: str, events: Sequence[Row], losses: tuple[float, float]) -> None:
        """Upright lines at these events and at those that there are, the newest of them."""
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
        """Forget the run, and what stands beside it, also as an older version of this program wrote it."""
        for run_id in [self.alerts, *(record["id"] for record in self._records())]:
            self.storage.delete_run(PROJECT, "", run_id=run_id)
        while self.storage.delete_run(PROJECT, self.run):
            pass

    def _empty(self, records: Iterable[dict[str, str]]) -> None:
        """Leave an entry its beginning alone, and never nothing: an open page unticks what is gone for a moment.

        Deleted past trackio's storage, which can only take out the whole run.
        """
        database = self.storage.get_project_db_path(PROJECT)
        for record in records:
            _ensure_run(self.storage, record["id"], record["name"], record["created_at"])
            own = (record["id"], f"{record['id']} begins")
            with self.storage._get_process_lock(PROJECT), self.storage._get_connection(database) as connection:
                connection.execute("DELETE FROM metrics WHERE run_id = ? AND log_id IS NOT ?", own)

    def _records(self, kind: str = "") -> list[dict[str, str]]:
        """The entries beside the run of a kind; without one all of them, and the run's own."""
        found: list[dict[str, str]] = self.storage.get_run_records(PROJECT)
        return [record for record in found if f"{record['id']}/".startswith(f"{self.run}/{kind}")]


def _vertical_line_points(low: float, high: float) -> list[Row]:
    """A line and a gap; rows without a loss keep both ends so far apart that the page's smoothing leaves them there."""
    apart: list[Row] = [{}] * (SMOOTHING // 2)
    return [{"loss": low}, *apart, {"loss": high}, {"loss": _GAP}, *apart]


def _isoformat(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
