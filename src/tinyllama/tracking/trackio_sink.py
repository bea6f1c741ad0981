"""Sink for trackio: one trackio run per run, in the project `tinyllama`, through trackio's public interface.

trackio's data is in `.trackio` next to the run, unless `TRACKIO_DIR` names another folder. trackio stores rows in a
thread and can neither flush nor delete single rows. Therefore a saved position exists only after `close`. After a kill
or a rollback, the run is deleted from trackio and all items are sent again.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllama.files import Row, reject_symlink, reject_symlinks
from tinyllama.recipe import Recipe
from tinyllama.runs.log import describe_event, event_kind, event_title
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import Scores, SinkPosition

PROJECT = "tinyllama"


def import_trackio(run: RunDir) -> Any:
    """Import trackio, whose first import reads the folder of its data from the environment."""
    folder = run.path.resolve().parent / ".trackio"
    reject_symlink(folder)
    reject_symlinks(folder)
    os.environ.setdefault("TRACKIO_DIR", str(folder))
    import trackio  # noqa: PLC0415 - after the variable is set

    return trackio


class TrackioSink:
    """Sink for a run in trackio. Problems of the run become alerts."""

    def __init__(self, run: RunDir, recipe: Recipe, position: SinkPosition) -> None:
        self.name, self.recipe, self.is_closed, self.problem = run.name, recipe, False, ""
        self.trackio = import_trackio(run)
        self.position_path = run.tracker_position_path("trackio")
        warnings.showwarning = self._record_warning  # trackio reports failures, also of its thread, as warnings
        if position == SinkPosition():
            self._delete()
        self.run = self._open()

    def log_metrics(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Send rows of metrics."""
        # `times` is unused, because trackio records the time at which it receives a row.
        self._forget_position()
        for row in rows:
            self.run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        self._check()

    def log_events(self, events: Sequence[Row]) -> None:
        """Send problems as alerts."""
        self._forget_position()
        levels = {"warn": self.trackio.AlertLevel.WARN, "error": self.trackio.AlertLevel.ERROR}
        for event in events:
            if level := levels.get(event_kind(event).level):
                self.run.alert(event_title(event), describe_event(event), level, step=event["step"])
        self._check()

    def log_scores(self, row: Row, time: float) -> None:
        """Send a release's scores at the release's step."""
        self.log_metrics([row], [time])

    def set_baselines(self, baselines: dict[str, Scores]) -> None:
        """Do nothing, because trackio cannot draw baselines; the report shows them."""

    def rewind(self, step: int) -> int:
        """Delete the run from trackio, because trackio cannot delete single rows."""
        self._forget_position()
        self.run.finish()
        self._delete()
        self.run = self._open()
        return 0

    def durable_position(self, position: SinkPosition) -> SinkPosition:
        """Return the position; before `close`, the run's beginning."""
        return position if self.is_closed else SinkPosition()

    def close(self) -> None:
        """Wait until trackio has stored all items."""
        self.run.finish()
        self._check()
        self.is_closed = True

    def _open(self) -> Any:
        return self.trackio.init(
            project=PROJECT,
            name=self.name,
            config=self.recipe.model_dump(mode="json"),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def _forget_position(self) -> None:
        """Delete the position that an earlier process saved, so that a kill from now on sends all items again."""
        self.position_path.unlink(missing_ok=True)

    def _delete(self) -> None:
        try:
            runs = list(self.trackio.Api().runs(PROJECT))
        except ValueError:  # trackio has no such project yet
            return
        for run in runs:
            if run.name == self.name:
                run.delete()

    def _record_warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        if Path(filename).parent.name == "trackio":
            self.problem = self.problem or str(message)

    def _check(self) -> None:
        if self.problem:
            raise RuntimeError(self.problem)
