"""A tracker's process beside training: follows the run until its standard input ends, and once more after that.

Training must not wait for a tracker, whatever that does: block, raise, eat memory, hang at the interpreter's end. It
says what went wrong in lines of JSON on standard output; what trackers themselves print goes to standard error.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tinyllama.errors import InputError, summarize_error
from tinyllama.files import exclusive_lock, reject_symlink
from tinyllama.formatting import echo
from tinyllama.recipe import Recipe
from tinyllama.tracking.follow import RunTailer, Sink, SinkPosition, read_progress
from tinyllama.tracking.trackio_sink import TrackioSink, is_on_network_filesystem, trackio_dir

POLL_SECONDS = 1.0


def open_sink(name: str, run: Path, recipe: Recipe) -> Sink:
    """Open `trackio`, `wandb` or `tensorboard` for a run; one that shows nothing of it yet forgets what is there."""
    position = read_progress(run, name)
    if name == "wandb":
        from tinyllama.tracking.wandb_sink import Wandb  # noqa: PLC0415 - an extra, and so is the next

        return Wandb(run, recipe, position)
    if name == "tensorboard":
        from tinyllama.tracking.tensorboard_sink import TensorBoard  # noqa: PLC0415

        return TensorBoard(run, recipe, position)
    return TrackioSink(run, recipe, is_new=position == SinkPosition())


def try_acquire_sink(run: Path, name: str, locks: ExitStack) -> bool:
    """Hold a sink's lock in a run until `locks` are closed; False where another process follows the run for it."""
    reject_symlink(run / "trackers")
    try:
        locks.enter_context(exclusive_lock(run / "trackers", f"{name}.lock", ""))
    except InputError:
        return False
    return True


def main(run: str, name: str, patience_seconds: str) -> int:
    """The process's exit status: 0, also where the tracker failed and that could be said."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(event: str, problem: str) -> None:
        print(json.dumps({"event": event, "problem": problem}), file=reports, flush=True)

    ended, beat = threading.Event(), SinkHeartbeat()
    threading.Thread(target=_wait_for_stdin_eof, args=(ended,), daemon=True).start()
    worker = threading.Thread(target=_run_reporting_errors, args=(Path(run), name, ended, beat, say), daemon=True)
    worker.start()
    _supervise(worker, beat, float(patience_seconds), say)
    return 0


def _wait_for_stdin_eof(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


class SinkHeartbeat:
    """When the tracker was last seen to move."""

    def __init__(self) -> None:
        self.time = time.monotonic()

    def __call__(self) -> None:
        """Say that it has."""
        self.time = time.monotonic()


def _supervise(worker: threading.Thread, beat: SinkHeartbeat, patience: float, say: Callable[[str, str], None]) -> None:
    """Wait for the worker; say once where a call takes longer than `patience` seconds."""
    is_said = False
    while worker.is_alive():
        worker.join(min(1.0, patience / 4))
        silent = time.monotonic() - beat.time
        if worker.is_alive() and silent > patience and not is_said:
            say("tracker-blocked", f"a call has taken {silent:.0f} s so far")
            is_said = True


def _run_reporting_errors(
    run: Path, name: str, ended: threading.Event, beat: SinkHeartbeat, say: Callable[[str, str], None]
) -> None:
    try:
        _follow(run, name, ended, beat)
    except BaseException as error:  # trackers end themselves in many ways
        say("tracker-failed", summarize_error(error))


def _follow(run: Path, name: str, ended: threading.Event, beat: SinkHeartbeat) -> None:
    if name == "trackio" and is_on_network_filesystem(trackio_dir(run)):
        echo("trackio's data lie on a network disk: `tinyllama watch` feeds it, not training", to_stderr=True)
        return
    with ExitStack() as locks:
        while not try_acquire_sink(run, name, locks):
            beat()
            if ended.wait(POLL_SECONDS):  # `watch` follows, and shows the end as well
                return
        recipe = Recipe.load(run / "recipe.yaml")
        follower = RunTailer(run, recipe, name, open_sink(name, run, recipe), beat)
        while not ended.wait(POLL_SECONDS):
            follower.poll()
        follower.poll()
        follower.close()
