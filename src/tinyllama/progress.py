"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_POLL_SECONDS = 0.5
_LINE_SECONDS = 15.0


class Bar:
    """Progress towards `total`; `show` says where it stands, with a few words beside it."""

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label, self.total, self.start = label, total, start
        self.began = self.last_line = time.monotonic()
        self.ended = False
        self._progress: Progress | None = None

    def __enter__(self) -> "Bar":
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[words]}"),
            )
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._progress = Progress(*columns, *times, console=console)
            self._task = self._progress.add_task(self.label, total=self.total, completed=self.start, words="")
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress:
            self._progress.stop()

    def show(self, done: int, words: str = "") -> None:
        """Say how far it is; without a terminal, a line every 15 seconds and one at the end."""
        if self._progress:
            self._progress.update(self._task, completed=done, words=words)
            return
        now = time.monotonic()
        is_last = done >= self.total and not self.ended
        if now - self.last_line >= _LINE_SECONDS or is_last:
            self.last_line, self.ended = now, is_last
            rate = (done - self.start) / (now - self.began) if now > self.began else 0.0
            left = f", {(self.total - done) / rate:.0f} s left" if rate and done < self.total else ""
            print(f"{self.label}: {done}/{self.total} {words}{left}", file=sys.stderr, flush=True)


@contextmanager
def track_count(label: str, total: int, unit: str, count: Callable[[], int]) -> Iterator[Callable[[], None]]:
    """Show how far `count()` has come, for work that other processes do, until the block ends.

    Yields the call that begins it: no thread should be there while processes are forked.
    """
    ended = threading.Event()
    with Bar(label, total, count()) as bar:

        def poll() -> None:
            while not ended.wait(_POLL_SECONDS):
                bar.show(count(), unit)

        thread = threading.Thread(target=poll, daemon=True)
        try:
            yield thread.start
        finally:
            ended.set()
            if thread.ident:
                thread.join()
            bar.show(count(), unit)
