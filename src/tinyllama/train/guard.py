"""The guard: what is done about a step that went wrong, decided from the step's loss and gradient norm alone; and the
watchdog, which ends a process that stands still.

Both are of all ranks together, so every rank decides the same without asking. A loss or gradient that is not finite
is never applied: the step is skipped. Skips without end, and a loss far above the recent ones, take the run back to its
last checkpoint, and the batches that led there are left out from then on (Chowdhery et al. 2022, arXiv:2204.02311,
section 5.1). `RUN/skipped_batches.json` keeps them, so that a run killed at any moment goes on as if it had not been.
"""

import math
import os
import statistics
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from tinyllama.files import read_json, write_json
from tinyllama.recipe import Guard

_MIN_RELATIVE_STD = 0.01
"""A standard deviation is taken as this share of the median at least: losses may be all but equal."""
_MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


class Action(Enum):
    """What becomes of a step."""

    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"


class SpikeDetector:
    """Judges each step by the losses before it."""

    def __init__(self, recipe: Guard, state: dict[str, Any] | None = None) -> None:
        self.recipe = recipe
        self.losses: deque[float] = deque((state or {}).get("losses", []), maxlen=recipe.spike_window_steps)
        self.skips: int = (state or {}).get("skips", 0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the guard to go on from it, as JSON."""
        return {"losses": list(self.losses), "skips": self.skips}

    def check(self, loss: float, norm: float) -> tuple[Action, str, int]:
        """Verdict, reason, and how many of the newest batches led to it, for a step's mean loss and gradient norm."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skips += 1
            verdict = Action.ROLL_BACK if self.skips > self.recipe.max_skips else Action.SKIP
            return verdict, f"loss {loss}, gradient norm {norm}", self.skips
        if is_spike(loss, self.losses, self.recipe):
            # Either this batch is odd, or the one before it, whose update came between.
            return Action.ROLL_BACK, f"loss {loss:.4f} against a median of {statistics.median(self.losses):.4f}", 2
        self.skips = 0
        self.losses.append(loss)
        return Action.APPLY, "", 0


def is_spike(loss: float, losses: Iterable[float], recipe: Guard) -> bool:
    """Whether a loss lies `spike_z_score` above the median of a full window of losses, by the robust z-score."""
    window = list(losses)
    if len(window) < recipe.spike_window_steps:
        return False
    median = statistics.median(window)
    deviation = statistics.median(abs(value - median) for value in window)
    return loss - median > recipe.spike_z_score * max(_MAD_TO_SIGMA * deviation, _MIN_RELATIVE_STD * abs(median))


def read_rollbacks(run: Path) -> list[dict[str, Any]]:
    """The times that a run went back, oldest first: `batches` left out, `checkpoint` gone back to, `step`, `reason`."""
    path = run / "skipped_batches.json"
    records: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    return records


def discard_stale_rollbacks(run: Path) -> None:
    """Where a run begins anew: batches were left out for checkpoints that are no more, but those of step 0."""
    records = read_rollbacks(run)
    kept = [record for record in records if record["checkpoint"] == 0]
    if kept != records:
        write_json(run / "skipped_batches.json", kept)


def all_skipped_batches(records: Iterable[dict[str, Any]]) -> frozenset[int]:
    """All batches that are left out."""
    return frozenset(batch for record in records for batch in record["batches"])


def record_rollback(run: Path, record: dict[str, Any]) -> None:
    """Add a time that the run goes back."""
    write_json(run / "skipped_batches.json", [*read_rollbacks(run), record])


class Heartbeat:
    """What tells the watchdog that something moves."""

    def __init__(self) -> None:
        self.silent, self.is_paused = 0.0, False

    def __call__(self) -> None:
        """Say that something has moved."""
        self.silent = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Not be watched while the block runs: reading and writing checkpoints takes as long as the disk does."""
        self.is_paused = True
        try:
            yield
        finally:
            self.silent, self.is_paused = 0.0, False


@contextmanager
def watchdog(seconds: float, on_hang: Callable[[], None]) -> Iterator[Heartbeat]:
    """Call `on_hang` and end the process, status 1, where the block lets `seconds` pass without a call of what it gets.

    A thread: the main one may wait in a collective that no exception reaches. It counts its own waits and not a clock's
    time, so a process that was stopped and goes on is not taken for one that hangs.
    """
    period = min(1.0, seconds / 4)
    watch, ended = Heartbeat(), threading.Event()

    def look() -> None:
        while not ended.wait(period):
            watch.silent += 0.0 if watch.is_paused else period
            if watch.silent > seconds:
                try:
                    on_hang()
                finally:
                    sys.stderr.flush()
                    os._exit(1)

    thread = threading.Thread(target=look, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()
