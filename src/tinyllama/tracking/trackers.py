"""The trackers beside training: a process for each that the recipe names, which reads what training writes.

What goes wrong in one is an event and a line, and it is left alone from then on: training neither waits for a tracker
nor ends with it. When training ends, each has some seconds for the last rows and is ended then.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from tinyllama.errors import InputError, summarize_error
from tinyllama.files import open_without_following
from tinyllama.formatting import echo
from tinyllama.processes import sidecar_environment
from tinyllama.recipe import Track
from tinyllama.runs.log import RunLog

PATIENCE_SECONDS = 60.0
"""A call that takes longer is told of."""
SHUTDOWN_TIMEOUT_SECONDS = 30.0
"""For the last rows, when training ends."""
_PROGRAM = """\
import sys
from tinyllama.processes import set_parent_death_signal
set_parent_death_signal(int(sys.argv.pop(1)))
from tinyllama.tracking.process import main
sys.exit(main(*sys.argv[1:]))
"""


def enabled_trackers(track: Track) -> list[str]:
    """The trackers that a recipe names, which are modules' names."""
    asked = {"trackio": track.trackio, "wandb": track.wandb is not None, "tensorboard": track.tensorboard}
    return [name for name, is_asked in asked.items() if is_asked]


def check_trackers(track: Track) -> None:
    """Raise InputError where the recipe names a tracker that is not installed."""
    for name in enabled_trackers(track):
        if find_spec(name) is None:
            raise InputError(f'track.{name}: {name} is not installed: pip install "tinyllama[track]"')


class Trackers:
    """A run's trackers, from the beginning of training to its end."""

    def __init__(self, track: Track, run: Path, journal: RunLog) -> None:
        self.trackers = [Tracker(name, run, journal) for name in enabled_trackers(track)]

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: object) -> None:
        """Let them show the rest; leave those that take too long."""
        for tracker in self.trackers:
            tracker.finish()
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT_SECONDS
        for tracker in self.trackers:
            tracker.leave(max(0.0, deadline - time.monotonic()))


class Tracker:
    """One tracker's process, and a thread that hears what it has to say."""

    def __init__(self, name: str, run: Path, journal: RunLog) -> None:
        self.name, self.run, self.journal = name, run, journal
        self.process: subprocess.Popen[str] | None = None
        self.is_told = self.is_left = False
        """Whether its failure was told; whether it was ended by us."""
        self.thread = threading.Thread(target=self._listen, name=f"tracker {name}", daemon=True)
        try:
            self.process = self._start()
        except OSError as error:
            self._report({"event": "tracker-failed", "problem": summarize_error(error)})
        else:
            self.thread.start()

    def finish(self) -> None:
        """Say that the run has ended."""
        if self.process and self.process.stdin:
            with contextlib.suppress(OSError):  # it has ended already
                self.process.stdin.close()

    def leave(self, seconds: float) -> None:
        """Wait so long for its end, then end it."""
        if self.process is None:
            return
        self.thread.join(seconds)
        if self.thread.is_alive():
            echo(f"{self.run}: {self.name} is still busy; left without the last of the run", to_stderr=True)
            self.is_left = True
            self.process.kill()

    def _start(self) -> "subprocess.Popen[str]":
        folder = self.run / "trackers"
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", _PROGRAM, str(os.getpid()), str(self.run), self.name, str(PATIENCE_SECONDS)]
        with open_without_following(folder / f"{self.name}.log") as log:
            # In a session of its own: a signal to all of the run's processes is for training alone.
            return subprocess.Popen(
                command,
                env=sidecar_environment(one_core=True),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def _listen(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._report(json.loads(line))
        status = self.process.wait()
        if status != 0 and not self.is_left and not self.is_told:
            self._report({"event": "tracker-failed", "problem": f"its process ended with status {status}"})

    def _report(self, report: Mapping[str, str]) -> None:
        event, problem = report["event"], report["problem"]
        failed = event == "tracker-failed"
        self.is_told |= failed
        words = "failed and is left alone from here on" if failed else "blocks; training goes on without waiting for it"
        echo(f"{self.run}: {self.name} {words}: {problem}", to_stderr=True)
        with contextlib.suppress(OSError):  # what fills the disk fails the tracker and its event
            self.journal.event(event, self.journal.step, tracker=self.name, problem=problem)
