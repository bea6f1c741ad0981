"""Sink for TensorBoard: event files in `RUN/tensorboard`, written without torch and TensorFlow.

After a rollback, this sink writes a session-start event at the checkpoint's step, so that TensorBoard drops all later
steps. Events of the run become text summaries. Baselines become separate runs in `baselines/NAME`, which TensorBoard
draws together with this run. If a process was killed, the next process truncates the files to the last saved position
and writes the later items again.
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

from tinyllama.files import Row, fsync_path
from tinyllama.recipe import Recipe
from tinyllama.runs.log import event_text
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import Scores, SinkPosition


class TensorBoardSink:
    """Sink that writes a run to event files. The x axis is the step; the number of tokens is one of the curves."""

    def __init__(self, run: RunDir, recipe: Recipe, position: SinkPosition) -> None:
        self.folder, self.steps = run.tensorboard_dir, recipe.train.steps
        if position == SinkPosition():
            shutil.rmtree(self.folder, ignore_errors=True)
        for path in self._files() if position.files else ():
            if path.name in position.files:
                os.truncate(path, position.files[path.name])
            else:
                path.unlink()
        self.writer = EventFileWriter(str(self.folder))

    def log_metrics(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Write rows of metrics as scalars."""
        for row, time in zip(rows, times, strict=True):
            self.writer.add_event(_scalars(row, time))
        self.writer.flush()

    def log_events(self, events: Sequence[Row]) -> None:
        """Write events as text summaries."""
        for event in events:
            text = text_pb("events", event_text(event))
            summary = Summary.FromString(text.SerializeToString())
            self.writer.add_event(Event(wall_time=event["time"], step=event["step"], summary=summary))
        self.writer.flush()

    def log_scores(self, row: Row, time: float) -> None:
        """Write a release's scores as scalars."""
        self.log_metrics([row], [time])

    def set_baselines(self, baselines: dict[str, Scores]) -> None:
        """Write each baseline as a run with the same scores at the first and last step."""
        shutil.rmtree(self.folder / "baselines", ignore_errors=True)
        for name, scores in baselines.items():
            writer = EventFileWriter(str(self.folder / "baselines" / name.strip("/").replace("/", "--")))
            for step in (0, self.steps):
                writer.add_event(_scalars({"step": step, **scores}, 0.0))
            writer.close()

    def rewind(self, step: int) -> int:
        """Make TensorBoard drop all items after a step."""
        self.writer.close()
        self.writer = EventFileWriter(str(self.folder))
        self.writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.writer.flush()
        return step

    def durable_position(self, position: SinkPosition) -> SinkPosition:
        """Flush the files to the disk; return the position with the files' sizes."""
        files = self._files()
        for path in files:
            fsync_path(path)
        return replace(position, files={path.name: path.stat().st_size for path in files})

    def close(self) -> None:
        """Write pending data and close."""
        self.writer.close()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("events.out.tfevents.*"))


def _scalars(row: Row, time: float) -> Event:
    values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
    return Event(wall_time=time, step=row["step"], summary=Summary(value=values))
