"""Recovery from bad steps by a skip or a rollback, and the watchdog that terminates a hung process.

The spike detector reads only the loss and the gradient norm over all ranks, so all ranks make the same decision. A step
with a loss or gradient that is not finite is skipped. After too many consecutive skips, or a loss far above the recent
losses, the run is rolled back to its newest checkpoint. The batches that caused the rollback are excluded from then on
(Chowdhery et al. 2022, arXiv:2204.02311, section 5.1). `RUN/skipped_batches.json` records these batches, so that a
resumed run also excludes them.
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
from typing import Any, NamedTuple

from tinyllama.errors import REQUEUE_STATUS
from tinyllama.files import write_json
from tinyllama.processes import Heartbeat, StopSignals
from tinyllama.recipe import Guard
from tinyllama.runs.run_dir import RunDir

_MIN_RELATIVE_STD = 0.01
"""Lower bound of the standard deviation, as a fraction of the median. Without this bound, a small increase after almost
equal losses would count as a spike."""
_MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution divided by its median absolute deviation."""
_MIN_SECONDS_AFTER_SIGNAL = 5.0
"""Minimum time without a heartbeat after which a process that received a stop signal counts as blocked."""


class Action(Enum):
    """Action that the spike detector or the loss scale chooses for a step."""

    APPLY = "apply"
    SKIP = "skip"
    OVERFLOW = "overflow"
    """Skip the step because of the loss scale. Such steps do not count as skips of the spike detector."""
    ROLL_BACK = "roll back"


class Decision(NamedTuple):
    """Decision on a step."""

    action: Action
    reason: str
    """Loss and gradient norm of a bad step; empty for a good step."""
    num_suspect_batches: int
    """Number of the newest batches that may have caused a bad step; 0 for a good step."""
    is_spike: bool = False


class SpikeDetector:
    """Detector of bad steps, which compares a step's loss with the losses of earlier steps."""

    def __init__(self, limits: Guard, state: dict[str, Any] | None = None) -> None:
        """Create a detector that continues from `state`, the result of an earlier detector's `state()`."""
        self.limits = limits
        self.losses: deque[float] = deque((state or {}).get("losses", []), maxlen=limits.spike_window_steps)
        self.skips: int = (state or {}).get("skips", 0)

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores, as JSON values."""
        return {"losses": list(self.losses), "skips": self.skips}

    def check(self, loss: float, norm: float) -> Decision:
        """Decide how to treat a step with this mean loss and gradient norm."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skips += 1
            action = Action.ROLL_BACK if self.skips > self.limits.max_skips else Action.SKIP
            return Decision(action, f"loss {loss}, gradient norm {norm}", self.skips)
        if is_spike(loss, self.losses, self.limits):
            # The cause is this batch, or the previous batch through its optimizer step.
            reason = f"loss {loss:.4f} against a median of {statistics.median(self.losses):.4f}"
            return Decision(Action.ROLL_BACK, reason, 2, is_spike=True)
        self.skips = 0
        self.losses.append(loss)
        return Decision(Action.APPLY, "", 0)


def is_spike(loss: float, losses: Iterable[float], limits: Guard) -> bool:
    """Return whether the robust z-score of a loss over the window of recent losses exceeds `spike_z_score`.

    If the window is not full, the result is False.
    """
    window = list(losses)
    if len(window) < limits.spike_window_steps:
        return False
    median = statistics.median(window)
    deviation = statistics.median(abs(value - median) for value in window)
    return loss - median > limits.spike_z_score * max(_MAD_TO_SIGMA * deviation, _MIN_RELATIVE_STD * abs(median))


def discard_stale_rollbacks(run: RunDir) -> None:
    """Delete the records of rollbacks, except those to step 0, when training restarts from step 0."""
    rollbacks = run.rollbacks()
    kept = [record for record in rollbacks if record["checkpoint"] == 0]
    if kept != rollbacks:
        write_json(run.rollbacks_path, kept)


@contextmanager
def watchdog(seconds: float, on_hang: Callable[[float], None], signals: StopSignals | None) -> Iterator[Heartbeat]:
    """Call `on_hang` and exit with status 1 if the block does not call the yielded heartbeat within `seconds`.

    With `signals`, a stop signal reduces the limit to twice the longest time between two heartbeats so far, but not
    below five seconds. The exit status is then REQUEUE_STATUS. The reason is that a process that waits for a dead peer
    in a collective cannot handle the signal. A stop signal before the first heartbeat changes neither value. `on_hang`
    receives the limit in seconds. The watchdog is a thread, because an exception cannot interrupt a main thread that
    waits in a collective.
    """
    period = min(1.0, seconds / 4)
    heartbeat, is_over = Heartbeat(), threading.Event()

    def monitor() -> None:
        while not is_over.wait(period):
            limit, status = seconds, 1
            if signals and signals.arrived and heartbeat.longest_seconds is not None:
                limit = min(seconds, max(_MIN_SECONDS_AFTER_SIGNAL, 2 * heartbeat.longest_seconds))
                status = REQUEUE_STATUS
            if heartbeat.add_wait(period) > limit:
                try:
                    on_hang(limit)
                finally:
                    sys.stderr.flush()
                    os._exit(status)

    thread = threading.Thread(target=monitor, name="watchdog", daemon=True)
    thread.start()
    try:
        yield heartbeat
    finally:
        is_over.set()
        thread.join()
