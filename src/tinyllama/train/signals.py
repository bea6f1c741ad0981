"""Signals that ask a run to save and end, so that a scheduler can start it again elsewhere."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAVING = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM: what schedulers and torchrun send first. SIGUSR1: what Slurm sends ahead of the time limit if told to."""
REQUEUE_STATUS = 75
"""Exit status after such a signal: sysexits.h's EX_TEMPFAIL, "try again later"."""


class Received:
    """The signal that has come, if any."""

    number: signal.Signals | None = None


@contextmanager
def noted() -> Iterator[Received]:
    """Note SIGTERM and SIGUSR1 while the block runs, instead of ending at once; only in the main thread."""
    received = Received()

    def note(number: int, frame: FrameType | None) -> None:
        received.number = signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in SAVING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
