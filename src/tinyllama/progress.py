"""Progress of long work: a bar on a terminal, elsewhere a plain line now and then, with the same content.

Writes to standard error: what is done, of how much, how fast of late, what else there is to say, and how long it will
take. What is printed meanwhile stands above the bar. `set_quiet` ends all of it for the process; the command line's
`--quiet` calls it, so nothing that works has to pass it on.
"""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinyllama.formatting import echo, format_duration, visible

BYTES = "bytes"
_POLL_SECONDS = 0.5
_FIRST_LINE_SECONDS, _LINE_SECONDS, _MAX_LOG_INTERVAL_SECONDS = 5.0, 15.0, 600.0
_MAX_LOG_LINES = 60
"""Once so many intervals have passed they grow: a line every 15 s at first, one in ten minutes after ten hours."""
_WINDOW_SECONDS, _WINDOW_SAMPLES = 60.0, 20
"""What the speed is measured over: the longer of both, for steps may be of milliseconds or of minutes."""

_state = {"quiet": False}


def set_quiet(quiet: bool = True) -> None:
    """Show no progress in this process from here on; errors and results are not progress."""
    _state["quiet"] = quiet


def is_quiet() -> bool:
    """Whether no progress shall be shown."""
    return _state["quiet"]


def _rate(value: float) -> str:
    """Three digits, or all before the point: `0.213`, `11.2`, `4,421`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _counted(done: int, total: int, unit: str) -> str:
    """How many of how many; bytes in units that are easily read."""
    if unit != BYTES:
        return f"{done:,}/{total:,} {unit}"
    name, size = ("GB", 1e9) if total >= 1e10 else ("MB", 1e6)
    return f"{done / size:,.1f}/{total / size:,.1f} {name}"


class RateEstimator:
    """How fast a count has grown of late; what came before the first sample, such as compiling, is left out."""

    def __init__(self) -> None:
        self.samples: deque[tuple[float, int]] = deque()

    def add(self, now: float, done: int) -> None:
        """Say how far it is at a time in seconds."""
        if self.samples and done < self.samples[-1][1]:  # it has gone back
            self.samples.clear()
        if not self.samples or done != self.samples[-1][1]:
            self.samples.append((now, done))
        while len(self.samples) > _WINDOW_SAMPLES and now - self.samples[1][0] > _WINDOW_SECONDS:
            self.samples.popleft()

    def per_second(self, now: float) -> float | None:
        """None before there are two samples. Work that stands still slows down."""
        if len(self.samples) < 2:
            return None
        (began, first), (ended, last) = self.samples[0], self.samples[-1]
        usual = (ended - began) / (len(self.samples) - 1)
        # A sample comes at the end of its work: until the next is overdue, the time since the last is not lost.
        return (last - first) / (ended - began + max(0.0, now - ended - usual))


class Bar:
    """Progress towards `total`; `show` says where it stands, with a few words beside it."""

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        start: int = 0,
        *,
        rate: str | None = None,
        each: float = 1,
        where: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total` and `start` are in `unit`, of which one makes `each` of what the `rate` counts, `unit` without it.

        An empty `rate` leaves it out, as for parts of unequal size; `BYTES` are shown as megabytes. `where` is a
        sentence on where to look, said once.
        """
        self.label, self.total, self.unit, self.start, self.where = visible(label), total, unit, start, where
        self.rate, self.each, self.clock = unit if rate is None else rate, each, clock
        if unit == BYTES:
            self.rate, self.each = "MB", 1e-6
        self.done, self.words, self.speed = start, "", RateEstimator()
        self.began = clock()
        self.last_line: float | None = None
        self.ended = False
        self._live: Live | None = None

    def __enter__(self) -> "Bar":
        if is_quiet():
            return self
        if self.where:
            echo(f"{self.label}: {self.where}", to_stderr=True)
        console = Console(stderr=True, highlight=False)
        if console.is_terminal and not console.is_dumb_terminal:
            # Redirected, what is printed meanwhile stands above the bar; a file as standard output stays one.
            self._live = Live(get_renderable=self._render, console=console, redirect_stdout=sys.stdout.isatty())
            before = sys.stderr
            self._live.start(refresh=True)
            _redirect_logs(before, sys.stderr)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            during = sys.stderr
            self._live.stop()
            _redirect_logs(during, sys.stderr)

    def show(self, done: int, words: str = "") -> None:
        """Say how far it is. Without a terminal this prints a line if it is time for one, and one at the end."""
        now = self.clock()
        self.done, self.words = done, visible(words)
        self.speed.add(now, done)
        if is_quiet() or self._live:
            return
        is_last = done >= self.total and not self.ended
        if is_last or self._is_due(now):
            self.last_line, self.ended = now, is_last
            said = ", ".join([self._percent(), *self._facts(now), self._time(now)])
            echo(f"{self.label}: {said}", to_stderr=True)

    def _is_due(self, now: float) -> bool:
        if self.last_line is None:
            return now - self.began >= _FIRST_LINE_SECONDS
        interval = min(max(_LINE_SECONDS, (now - self.began) / _MAX_LOG_LINES), _MAX_LOG_INTERVAL_SECONDS)
        return now - self.last_line >= interval

    def _facts(self, now: float) -> list[str]:
        count = _counted(self.done, self.total, self.unit)
        speed = self._mean(now) if self.done >= self.total else self.speed.per_second(now)
        rate = f"{_rate(speed * self.each)} {self.rate}/s" if speed and self.rate else ""
        return [part for part in (count, rate, self.words) if part]

    def _percent(self) -> str:
        """Rounded down: 100 % is the end."""
        return f"{100 * self.done // self.total if self.total else 100} %"

    def _mean(self, now: float) -> float | None:
        return (self.done - self.start) / (now - self.began) if now > self.began else None

    def _time(self, now: float) -> str:
        if self.done >= self.total:
            return f"took {format_duration(now - self.began)}"
        speed = self.speed.per_second(now)
        return (
            f"{format_duration((self.total - self.done) / speed)} left"
            if speed
            else f"{format_duration(now - self.began)} so far"
        )

    def _render(self) -> Group:
        """Two lines, so that 60 columns are enough: how far and how long, then the numbers."""
        now = self.clock()
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(no_wrap=True, overflow="ellipsis", max_width=30)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True, justify="right", min_width=5)
        top.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=self.total or 1, completed=self.done if self.total else 1)
        share, time_left = Text(self._percent(), "progress.percentage"), Text(self._time(now), "progress.remaining")
        top.add_row(Text(self.label, "bold"), bar, share, time_left)
        return Group(top, Text(f"  {', '.join(self._facts(now))}", no_wrap=True, overflow="ellipsis"))


def _redirect_logs(before: TextIO, after: TextIO) -> None:
    """Have what logs to one stream, such as torch, which keeps the one of its import, log to another."""
    loggers = (logging.root, *logging.root.manager.loggerDict.values())
    for handler in [handler for logger in loggers for handler in getattr(logger, "handlers", ())]:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(after)


@contextmanager
def poll_progress(
    label: str,
    total: int,
    unit: str,
    count: Callable[[], int],
    words: Callable[[], str] = str,
    where: str = "",
) -> Iterator[Callable[[], None]]:
    """Show how far `count()` has come, with `words()`, for work that other processes do, until the block ends.

    Yields the call that begins it: no thread should be there while processes are forked.
    """
    ended = threading.Event()
    with Bar(label, total, unit, count(), where=where) as bar:

        def poll() -> None:
            while not ended.wait(_POLL_SECONDS):
                bar.show(count(), words())

        thread = threading.Thread(target=poll, daemon=True)
        try:
            yield thread.start
        finally:
            ended.set()
            if thread.ident:
                thread.join()
        bar.show(total)
