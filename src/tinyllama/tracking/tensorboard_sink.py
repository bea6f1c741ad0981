"""TensorBoard as a sink: event files under `RUN/tensorboard`, written without torch or TensorFlow.

Where a run went back, a session's beginning at that step tells TensorBoard to drop what came after it before. Events of
a run are texts; baselines are runs of their own in `baselines/NAME`, which it draws next to this one. What a killed
process wrote after its last saved position is cut off the files when the next one opens them, and written again.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tinyllama.files import fsync_path
from tinyllama.recipe import Recipe
from tinyllama.tracking.alerts import alert_of
from tinyllama.tracking.follow import SinkPosition
from tinyllama.tracking.tail import Row, Scores


class TensorBoard:
    """A run in event files; its axis is the step, the tokens are a curve."""

    def __init__(self, run: Path, recipe: Recipe, position: SinkPosition) -> None:
        self.folder, self.steps = run / "tensorboard", recipe.train.steps
        if position == SinkPosition():
            shutil.rmtree(self.folder, ignore_errors=True)
        for path in self._files() if position.files else ():
            if path.name in position.files:
                os.truncate(path, position.files[path.name])
            else:
                path.unlink()
        self.writer = EventFileWriter(str(self.folder))

    def rows(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Show metrics."""
        for row, time in zip(rows, times, strict=True):
            self.writer.add_event(_scalars(row, time))
        self.writer.flush()

    def events(self, events: Sequence[Row], losses: tuple[float, float] | None) -> None:
        """Show what happened, as texts."""
        for event in events:
            alert = alert_of(event)
            summary = Summary.FromString(text_pb("events", f"{alert.title}: {alert.text}").SerializeToString())
            self.writer.add_event(Event(wall_time=event["time"], step=event["step"], summary=summary))
        self.writer.flush()

    def scores(self, row: Row, time: float) -> None:
        """Show a release's scores."""
        self.rows([row], [time])

    def baselines(self, baselines: dict[str, Scores]) -> None:
        """A run each, of two points."""
        shutil.rmtree(self.folder / "baselines", ignore_errors=True)
        for name, scores in baselines.items():
            writer = EventFileWriter(str(self.folder / "baselines" / name.strip("/").replace("/", "--")))
            for step in (0, self.steps):
                writer.add_event(_scalars({"step": step, **scores}, 0.0))
            writer.close()

    def go_back(self, step: int) -> int:
        """Have it drop what came after a step."""
        self.writer.close()
        self.writer = EventFileWriter(str(self.folder))
        self.writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.writer.flush()
        return step

    def held(self, progress: SinkPosition) -> SinkPosition:
        """Return the position itself with the files' sizes, once they are on the disk."""
        files = self._files()
        for path in files:
            fsync_path(path)
        return replace(progress, files={path.name: path.stat().st_size for path in files})

    def close(self) -> None:
        """Write what is not yet written."""
        self.writer.close()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("events.out.tfevents.*"))


def _scalars(row: Row, time: float) -> Event:
    values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
    return Event(wall_time=time, step=row["step"], summary=Summary(value=values))
