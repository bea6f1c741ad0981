"""Sidecar processes for trackers: each tracker in the recipe gets one process, which follows the run's files.

Training neither waits for a tracker nor fails because of a tracker. A tracker may block, raise, run out of memory, or
hang at the interpreter's exit. A failure is logged as an event and printed in one line. When training ends, all
trackers together have a limited time to deliver the last rows before they are killed. `main` runs in the sidecar
process.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen

from tinyllama.errors import CommandAbort, InputError, summarize_error
from tinyllama.files import LockHeldError, exclusive_lock, open_without_following, reject_symlink
from tinyllama.formatting import echo
from tinyllama.processes import Heartbeat, start_sidecar
from tinyllama.recipe import Track
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import RunFollower, Sink, read_position

POLL_SECONDS = 1.0
CALL_TIMEOUT_SECONDS = 60.0
"""Duration in seconds after which a call to a tracker is reported as blocked."""
SHUTDOWN_TIMEOUT_SECONDS = 30.0
"""Time in seconds in which all trackers together must deliver the last rows when training ends."""


def enabled_trackers(track: Track) -> list[str]:
    """Return the names of the recipe's trackers, which are also the names of the Python modules that they need."""
    enabled = {"trackio": track.trackio, "wandb": track.wandb is not None, "tensorboard": track.tensorboard}
    return [name for name, is_enabled in enabled.items() if is_enabled]


def check_trackers(track: Track) -> None:
    """Check that the recipe's trackers are installed. Raises InputError for the first missing tracker."""
    for name in enabled_trackers(track):
        if find_spec(name) is None:
            off = "null" if name == "wandb" else "false"
            remedy = f'pip install "tinyllama[track]", or set track.{name} to {off}'
            raise InputError(f"track.{name}: {name} is not installed; {remedy}")


@contextlib.contextmanager
def run_trackers(track: Track, run: RunDir, log: RunLog) -> Iterator[None]:
    """Run the recipe's trackers during the block; then let them deliver the last rows, and kill slow trackers."""
    trackers, timeout = [Tracker(name, run, log) for name in enabled_trackers(track)], SHUTDOWN_TIMEOUT_SECONDS
    try:
        yield
    except CommandAbort:
        timeout = 0.0
        raise
    finally:
        for tracker in trackers:
            tracker.finish()
        deadline = time.monotonic() + timeout
        for tracker in trackers:
            tracker.terminate(max(0.0, deadline - time.monotonic()))


class Tracker:
    """Sidecar process of one tracker, and a thread that receives the reports of this process."""

    def __init__(self, name: str, run: RunDir, log: RunLog) -> None:
        self.name, self.run, self.log = name, run, log
        self.has_failed = self.is_terminated = False
        self.thread = threading.Thread(target=self._receive_reports, name=f"tracker {name}", daemon=True)
        self.process: Popen[str] | None = None
        try:
            run.trackers_dir.mkdir(exist_ok=True)
            with open_without_following(run.tracker_log_path(name)) as file:
                arguments = (str(run.path), name, str(CALL_TIMEOUT_SECONDS))
                self.process = start_sidecar("tinyllama.tracking.trackers", *arguments, one_core=True, log=file)
        except OSError as error:
            self._report("tracker-failed", summarize_error(error))
        else:
            self.thread.start()

    def finish(self) -> None:
        """Close the process's standard input, to signal that the run has ended."""
        if self.process and self.process.stdin:
            with contextlib.suppress(OSError):  # the process has ended already
                self.process.stdin.close()

    def terminate(self, seconds: float) -> None:
        """Wait at most `seconds` for the process to end, then kill it."""
        if self.process is None:
            return
        self.thread.join(seconds)
        if self.thread.is_alive():
            echo(f"{self.run.path}: {self.name} is still busy; killed before it received the last rows", to_stderr=True)
            self.is_terminated = True
            self.process.kill()

    def _receive_reports(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        with self.process:  # closes the pipes and waits for the end
            for line in self.process.stdout:
                self._report(**json.loads(line))
        if (status := self.process.returncode) != 0 and not self.is_terminated and not self.has_failed:
            self._report("tracker-failed", f"its process ended with status {status}")

    def _report(self, event: str, problem: str) -> None:
        self.has_failed |= event == "tracker-failed"
        effect = "failed and is not used until the next start" if self.has_failed else "blocks; training continues"
        echo(f"{self.run.path}: {self.name} {effect}: {problem}", to_stderr=True)
        with contextlib.suppress(OSError):  # a full disk may cause the tracker's failure and prevent writing the event
            self.log.event(event, self.log.step, tracker=self.name, problem=problem)


def main(run: str, name: str, call_timeout_seconds: str) -> int:
    """Follow a run for a tracker until standard input is closed, then deliver the remaining items; return 0.

    Failures are reported as lines of JSON on standard output. The output of trackers goes to standard error.
    """
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def report(event: str, problem: str) -> None:
        print(json.dumps({"event": event, "problem": problem}), file=reports, flush=True)

    ended, heartbeat = threading.Event(), Heartbeat()

    def wait_for_end_of_stdin() -> None:
        sys.stdin.read()
        ended.set()

    def work() -> None:
        try:
            _follow_until(ended, RunDir(Path(run)), name, heartbeat)
        except BaseException as error:  # some trackers call exit
            report("tracker-failed", summarize_error(error))

    threading.Thread(target=wait_for_end_of_stdin, daemon=True).start()
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    _supervise(worker, heartbeat, float(call_timeout_seconds), report)
    return 0


def _supervise(
    worker: threading.Thread, heartbeat: Heartbeat, timeout: float, report: Callable[[str, str], None]
) -> None:
    """Wait for the worker; report once if a call takes longer than `timeout` seconds."""
    is_reported, period = False, min(1.0, timeout / 4)
    while worker.is_alive():
        worker.join(period)
        silent_seconds = heartbeat.add_wait(period)
        if worker.is_alive() and silent_seconds > timeout and not is_reported:
            report("tracker-blocked", f"a call has taken {silent_seconds:.0f} s so far")
            is_reported = True


def _follow_until(ended: threading.Event, run: RunDir, name: str, heartbeat: Heartbeat) -> None:
    with contextlib.ExitStack() as locks:
        while not try_acquire_sink(run, name, locks):
            heartbeat()
            if ended.wait(POLL_SECONDS):  # the tracker of an earlier process still follows the run
                return
        follower = RunFollower(run, name, open_sink(name, run), heartbeat)
        while not ended.wait(POLL_SECONDS):
            follower.poll()
        follower.poll()
        follower.close()


def open_sink(name: str, run: RunDir) -> Sink:
    """Open the `trackio`, `wandb` or `tensorboard` sink of a run; empty the sink if no data of the run was sent yet."""
    recipe, position = run.recipe(), read_position(run, name)
    # The imports are local, because each sink needs its own library, which may be missing.
    if name == "wandb":
        from tinyllama.tracking.wandb_sink import WandbSink  # noqa: PLC0415

        return WandbSink(run, recipe, position)
    if name == "tensorboard":
        from tinyllama.tracking.tensorboard_sink import TensorBoardSink  # noqa: PLC0415

        return TensorBoardSink(run, recipe, position)
    from tinyllama.tracking.trackio_sink import TrackioSink  # noqa: PLC0415

    return TrackioSink(run, recipe, position)


def try_acquire_sink(run: RunDir, name: str, locks: contextlib.ExitStack) -> bool:
    """Acquire a sink's lock in a run until `locks` is closed; return False if another process holds the lock."""
    reject_symlink(run.trackers_dir)
    try:
        locks.enter_context(exclusive_lock(run.tracker_lock_path(name), ""))
    except LockHeldError:
        return False
    return True
