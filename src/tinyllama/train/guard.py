"""The guard: what happens after a bad step, and the watchdog, which ends a process that hangs.

The spike detector reads only the loss and the gradient norm over all ranks, so all ranks decide alike. A step with a
loss or gradient that is not finite is skipped. Too many skips in a row, or a loss far above the recent ones, roll the
run back to its newest checkpoint; the batches that led there are excluded from then on (Chowdhery et al. 2022,
arXiv:2204.02311, section 5.1). `RUN/skipped_batches.json` records them, so that a resumed run excludes them too.
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

from tinyllama.files import write_json
from tinyllama.recipe import Guard
from tinyllama.runs.run_dir import RunDir
from tinyllama.runs.sidecar import Heartbeat

_MIN_RELATIVE_STD = 0.01
"""Lower bound of the standard deviation, as a fraction of the median: losses may be almost equal."""
_MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution divided by its median absolute deviation."""


class Action(Enum):
    """What happens with the gradient of a step."""

    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"


class Decision(NamedTuple):
    """The detector's decision on a step."""

    action: Action
    reason: str
    """Loss and gradient norm of a bad step; empty for a good one."""
    num_suspect_batches: int
    """Number of newest batches that led to a bad step."""
    is_spike: bool = False


class SpikeDetector:
    """Decides on each step by comparing its loss with those of the steps before."""

    def __init__(self, limits: Guard, state: dict[str, Any] | None = None) -> None:
        """Continue from `state`, which is `state()` of an earlier detector."""
        self.limits = limits
        self.losses: deque[float] = deque((state or {}).get("losses", []), maxlen=limits.spike_window_steps)
        self.skips: int = (state or {}).get("skips", 0)

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores, as JSON values."""
        return {"losses": list(self.losses), "skips": self.skips}

    def check(self, loss: float, norm: float) -> Decision:
        """Decide on a step with this mean loss and gradient norm."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skips += 1
            action = Action.ROLL_BACK if self.skips > self.limits.max_skips else Action.SKIP
            return Decision(action, f"loss {loss}, gradient norm {norm}", self.skips)
        if is_spike(loss, self.losses, self.limits):
            # The cause is this batch, or the previous one through its update.
            reason = f"loss {loss:.4f} against a median of {statistics.median(self.losses):.4f}"
            return Decision(Action.ROLL_BACK, reason, 2, is_spike=True)
        self.skips = 0
        self.losses.append(loss)
        return Decision(Action.APPLY, "", 0)


def is_spike(loss: float, losses: Iterable[float], limits: Guard) -> bool:
    """Return whether a loss is `spike_z_score` above the median of a full window of losses, by the robust z-score."""
    window = list(losses)
    if len(window) < limits.spike_window_steps:
        return False
    median = statistics.median(window)
    deviation = statistics.median(abs(value - median) for value in window)
    return loss - median > limits.spike_z_score * max(_MAD_TO_SIGMA * deviation, _MIN_RELATIVE_STD * abs(median))


def record_rollback(run: RunDir, record: dict[str, Any]) -> None:
    """Append a rollback to the run's record."""
    write_json(run.rollbacks_path, [*run.rollbacks(), record])


def discard_stale_rollbacks(run: RunDir) -> None:
    """Drop the rollbacks to deleted checkpoints when training restarts from step 0; those to step 0 are kept."""
    rollbacks = run.rollbacks()
    kept = [record for record in rollbacks if record["checkpoint"] == 0]
    if kept != rollbacks:
        write_json(run.rollbacks_path, kept)


@contextmanager
def watchdog(seconds: float, on_hang: Callable[[], None]) -> Iterator[Heartbeat]:
    """Call `on_hang` and exit with status 1 if the block does not call the yielded heartbeat for `seconds`.

    The watchdog is a thread, because the main thread may wait in a collective that no exception reaches. It counts its
    own waits and not a clock's time, so that a process that was stopped and continued does not count as hanging.
    """
    period = min(1.0, seconds / 4)
    heartbeat, is_over = Heartbeat(), threading.Event()

    def monitor() -> None:
        while not is_over.wait(period):
            if heartbeat.add_wait(period) > seconds:
                try:
                    on_hang()
                finally:
                    sys.stderr.flush()
                    os._exit(1)

    thread = threading.Thread(target=monitor, name="watchdog", daemon=True)
    thread.start()
    try:
        yield heartbeat
    finally:
        is_over.set()
        thread.join()
