"""trackio's page as a sink: its database lies beside the runs (`.trackio`), so that one page compares them.

Written through its storage and not through `trackio.init`: that one asks the hub who the user is, swallows what goes
wrong and writes from threads, where this commits each call or raises. Releases and what went wrong are marks: runs of
two points, which the page draws as upright lines.
"""

import importlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from tinyllama.recipe import Recipe
from tinyllama.track.record import Row, Scores
from tinyllama.track.words import alert_of, is_mark

PROJECT = "tinyllama"
ALERTS = 20
"""Of a run at most, the newest: the page lists the 20 oldest of those that there are."""
_QUIET = ("start", "checkpoint")
"""Events that are no alert: the list opens over the charts as soon as there is one."""
_ALERT = ("title", "text", "level", "step", "timestamp")
MARKS = 16
"""Marks of a run at most, the newest: the page fetches 64 runs at a time."""


def folder_of(run: Path) -> Path:
    """Where trackio keeps the runs beside `run`."""
    return run.resolve().parent / ".trackio"


def open_trackio(folder: Path) -> Any:
    """Import trackio with its data in `folder`: it reads where from the environment, when first imported."""
    os.environ["TRACKIO_DIR"] = str(folder)
    trackio = importlib.import_module("trackio")
    is_there = importlib.import_module("trackio.utils").TRACKIO_DIR
    if is_there != folder:
        raise RuntimeError(f"this process has trackio's data in {is_there} already")
    return trackio


def is_for_one_writer(folder: Path) -> bool:
    """Whether trackio's database in this folder would lie on a network disk, where SQLite bears no second writer."""
    return bool(open_trackio(folder).utils.is_network_filesystem(folder))


class Page:
    """A run on trackio's page."""

    def __init__(self, run: Path, recipe: Recipe, is_new: bool) -> None:
        self.run, self.recipe = run.resolve().name, recipe
        self.alerts = f"{self.run}/alerts"
        self.storage = open_trackio(folder_of(run)).SQLiteStorage
        if is_new:  # what is there under this name is of a run that is no more
            self._clear()

    def rows(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Show metrics; one that is there already is left as it is."""
        config = self.recipe.model_dump(mode="json") | {"_Group": None}
        self._log(self.run, self.run, rows, times, [f"{self.run} {row['step']}" for row in rows], config)

    def events(self, events: Sequence[Row], losses: tuple[float, float] | None) -> None:
        """To the page's alerts, unless everything is as it should be; marks to the loss."""
        self._alert([event for event in events if event["event"] not in _QUIET])
        for event in [event for event in events if is_mark(event)][-MARKS:] if losses else []:
            self._mark(event, losses or (0.0, 0.0))
        for stale in sorted(self._others("mark"))[:-MARKS]:
            self.storage.delete_run(PROJECT, "", run_id=stale)

    def scores(self, row: Row, time: float) -> None:
        """Show a release's scores at its tokens; among the rows of its time, or the page would smooth scores."""
        self._log(self.run, self.run, [row], [time], [f"{self.run} {sorted(row.items())}"])

    def baselines(self, baselines: dict[str, Scores]) -> None:
        """A run each, whose scores are flat lines from no tokens to the run's last."""
        for stale in self._others("baseline"):
            self.storage.delete_run(PROJECT, "", run_id=stale)
        steps, batch = (0, self.recipe.train.steps), self.recipe.train.batch_tokens
        for name, scores in baselines.items():
            rows = [{"step": step, "tokens": step * batch, **scores} for step in steps]
            self._beside("baseline", name, name, rows)

    def go_back(self, step: int) -> int:
        """Rows cannot be taken out one by one: all come again."""
        self._clear()
        return 0

    def close(self) -> None:
        """Nothing waits."""

    def _alert(self, events: Sequence[Row]) -> None:
        """Add to the alerts; in a run of their own, since they can only be taken out with their run."""
        new = [
            asdict(alert_of(event))
            | {"title": self._title(event), "step": event["step"], "timestamp": _when(event["time"])}
            for event in events
        ]
        there = self.storage.get_alerts(PROJECT, run_id=self.alerts) if new else []
        kept = sorted([*there, *new], key=itemgetter("timestamp"))[-ALERTS:]
        if new:
            self.storage.delete_run(PROJECT, "", run_id=self.alerts)
            columns = {f"{name}s": [alert[name] for alert in kept] for name in _ALERT}
            self.storage.bulk_alert(PROJECT, self.run, **columns, run_id=self.alerts)

    def _mark(self, event: Row, losses: tuple[float, float]) -> None:
        tokens = event["step"] * self.recipe.train.batch_tokens
        rows = [{"step": event["step"], "tokens": tokens, "loss": loss} for loss in losses]
        self._beside("mark", f"{event['step']:012} {event['event']}", self._title(event), rows)

    def _title(self, event: Row) -> str:
        return f"{alert_of(event).title} of {self.run}"

    def _beside(self, kind: str, key: str, name: str, rows: Sequence[Row]) -> None:
        """Show a run that stands for something else than a run, in a group of its own; once."""
        run_id = f"{self.run}/{kind}/{key}"
        config = {"_Group": f"{kind}s of {self.run}"}
        # As of the beginning of time: the page lists and colours runs by when they began, newest first.
        self._log(name, run_id, rows, [0.0] * len(rows), [f"{run_id} {number}" for number in range(len(rows))], config)

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
        metrics = [{key: value for key, value in row.items() if key != "step"} for row in rows]
        steps, stamps = [row["step"] for row in rows], list(map(_when, times))
        self.storage.bulk_log(PROJECT, name, metrics, steps, stamps, config, keys, run_id=run_id)

    def _clear(self) -> None:
        """Forget the run, and what stands beside it, also as an older version of this program wrote it."""
        for run_id in [self.run, self.alerts, *self._others("mark"), *self._others("baseline")]:
            self.storage.delete_run(PROJECT, "", run_id=run_id)
        while self.storage.delete_run(PROJECT, self.run):
            pass

    def _others(self, kind: str) -> list[str]:
        """The ids of the runs that stand beside this one."""
        ids = [record["id"] for record in self.storage.get_run_records(PROJECT)]
        return [run_id for run_id in ids if run_id.startswith(f"{self.run}/{kind}/")]


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
