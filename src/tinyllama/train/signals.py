"""Signals that ask a run to save and end, so that a scheduler can start it again elsewhere."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tinyllama.errors import RunStoppedError

SAVING = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM: what schedulers and torchrun send first. SIGUSR1: what Slurm sends ahead of the time limit if told to."""
REQUEUE_STATUS = 75
"""Exit status after such a signal: sysexits.h's EX_TEMPFAIL, "try again later"."""


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """End with the same status, and in a line, where SIGTERM or SIGUSR1 comes while there is nothing to save."""

    def end(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise RunStoppedError(f"{name}: ended; the same command goes on from where it stands", status=REQUEUE_STATUS)

    with _signal_handlers(end):
        yield


class PendingSignal:
    """The signal that has come, if any."""

    number: signal.Signals | None = None


@contextmanager
def record_signals() -> Iterator[PendingSignal]:
    """Note SIGTERM and SIGUSR1 while the block runs, instead of ending at once; only in the main thread."""
    received = PendingSignal()

    def note(number: int, frame: FrameType | None) -> None:
        received.number = signal.Signals(number)

    with _signal_handlers(note):
        yield received


@contextmanager
def _signal_handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have the signals handled by a function while the block runs; a thread cannot, and leaves them as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SAVING}
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)
