"""Handling of SIGTERM and SIGUSR1: save a checkpoint, then exit with a status that makes schedulers requeue the run."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tinyllama.errors import RunStoppedError

HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Stop signals: SIGTERM of schedulers and torchrun, and SIGUSR1, which Slurm can send before the time limit."""
REQUEUE_STATUS = 75
"""Exit status after SIGTERM or SIGUSR1: EX_TEMPFAIL ("try again later") of sysexits.h."""


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Exit with `REQUEUE_STATUS` on SIGTERM or SIGUSR1 during a block that has nothing to save."""

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise RunStoppedError(f"{name}: stopped; rerun the same command to resume", status=REQUEUE_STATUS)

    with _signal_handlers(stop):
        yield


class PendingSignal:
    """The signal that was received, or None."""

    number: signal.Signals | None = None


@contextmanager
def record_signals() -> Iterator[PendingSignal]:
    """In the main thread, record SIGTERM and SIGUSR1 during the block instead of exiting."""
    pending = PendingSignal()

    def record(number: int, frame: FrameType | None) -> None:
        pending.number = signal.Signals(number)

    with _signal_handlers(record):
        yield pending


@contextmanager
def _signal_handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install a signal handler for the block; do nothing in threads other than the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)
