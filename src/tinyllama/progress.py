"""Progress of long work on standard error: a bar on a terminal with rich, and occasional plain lines elsewhere.

The bar and the lines show the amount done, the recent rate, details such as the loss, and the time left. Other output
appears above the bar. The command line's `--quiet` calls `set_quiet`, which hides progress in this process.
"""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, TextIO

from tinyllama.formatting import echo, format_duration, visible

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

# A machine that only trains may lack rich, which takes 0.1 s to import and draws only the bar.
# ruff: noqa: PLC0415

BYTES = "bytes"
_POLL_SECONDS = 0.5
_FIRST_LINE_SECONDS, _LINE_SECONDS, _MAX_LOG_INTERVAL_SECONDS = 5.0, 15.0, 600.0
_MAX_LOG_LINES = 60
"""Number of lines after which the interval between lines grows, from 15 s to ten minutes (after ten hours)."""
_WINDOW_SECONDS, _WINDOW_SAMPLES = 60.0, 20
"""Window of the rate, in seconds and in samples. The longer window applies, since a step may take milliseconds or
minutes."""

_state = {"quiet": False}


def set_quiet(quiet: bool = True) -> None:
    """Hide progress in this process from now on; errors and results are still shown."""
    _state["quiet"] = quiet


def is_quiet() -> bool:
    """Return whether progress is hidden."""
    return _state["quiet"]


def _format_rate(value: float) -> str:
    """Format a rate with three significant digits, or without decimals from 100 on: `0.213`, `11.2`, `4,421`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _format_counter(done: int, total: int, unit: str) -> str:
    """Format the amount done and the total, with bytes as MB or GB."""
    if unit != BYTES:
        return f"{done:,}/{total:,} {unit}"
    name, size = ("GB", 1e9) if total >= 1e10 else ("MB", 1e6)
    return f"{done / size:,.1f}/{total / size:,.1f} {name}"


class RateEstimator:
    """Estimator of a growing count's recent rate, without work before the first sample, such as compilation."""

    def __init__(self) -> None:
        self.samples: deque[tuple[float, int]] = deque()

    def add(self, now: float, done: int) -> None:
        """Record that the count was `done` at the time `now` in seconds."""
        if self.samples and done < self.samples[-1][1]:  # a rollback
            self.samples.clear()
        if not self.samples or done != self.samples[-1][1]:
            self.samples.append((now, done))
        while len(self.samples) > _WINDOW_SAMPLES and now - self.samples[1][0] > _WINDOW_SECONDS:
            self.samples.popleft()

    def per_second(self, now: float) -> float | None:
        """Return the count's increase per second at the time `now`; None before the second sample.

        The rate falls while the count does not increase.
        """
        if len(self.samples) < 2:
            return None
        (began, first), (ended, last) = self.samples[0], self.samples[-1]
        usual = (ended - began) / (len(self.samples) - 1)
        # A sample is added when its work ends, so the time since the last sample counts only if the next sample is
        # overdue.
        return (last - first) / (ended - began + max(0.0, now - ended - usual))


class Bar:
    """Progress bar of known total length, updated by `show`."""

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
        """Describe the work; `total` and `start` are amounts in `unit`.

        By default, the rate is shown in `unit` per second. `rate` names another unit for the rate, and `each` is its
        amount per `unit`: with unit="step", rate="tokens" and each=8192, the rate is in tokens per second, for steps of
        8,192 tokens. An empty `rate` hides the rate, which suits units of unequal size. The unit BYTES is shown as
        megabytes. `where` is a sentence that is printed once, at the start.
        """
        self.label, self.total, self.unit, self.start, self.where = visible(label), total, unit, start, where
        self.rate, self.each, self.clock = unit if rate is None else rate, each, clock
        if unit == BYTES:
            self.rate, self.each = "MB", 1e-6
        self.done, self.details, self.speed = start, "", RateEstimator()
        self.began = clock()
        self.last_line: float | None = None
        self.ended = False
        self._live: Live | None = None

    def __enter__(self) -> "Bar":
        if is_quiet():
            return self
        if self.where:
            echo(f"{self.label}: {self.where}", to_stderr=True)
        if sys.stderr.isatty() and find_spec("rich"):
            self._start_display()
        return self

    def _start_display(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True, highlight=False)
        if console.is_terminal and not console.is_dumb_terminal:
            # Other output is redirected to appear above the bar. Standard output is not redirected if it is a file.
            self._live = Live(get_renderable=self._render, console=console, redirect_stdout=sys.stdout.isatty())
            before = sys.stderr
            self._live.start(refresh=True)
            _redirect_logs(before, sys.stderr)

    def __exit__(self, *error: object) -> None:
        if self._live:
            during = sys.stderr
            self._live.stop()
            _redirect_logs(during, sys.stderr)

    def show(self, done: int, details: str = "") -> None:
        """Show the amount `done` and details; without a terminal, print a line at intervals and at the end."""
        now = self.clock()
        self.done, self.details = done, visible(details)
        self.speed.add(now, done)
        if is_quiet() or self._live:
            return
        is_last = done >= self.total and not self.ended
        if is_last or self._is_due(now):
            self.last_line, self.ended = now, is_last
            line = ", ".join([self._percent(), *self._stats(now), self._time(now)])
            echo(f"{self.label}: {line}", to_stderr=True)

    def _is_due(self, now: float) -> bool:
        if self.last_line is None:
            return now - self.began >= _FIRST_LINE_SECONDS
        interval = min(max(_LINE_SECONDS, (now - self.began) / _MAX_LOG_LINES), _MAX_LOG_INTERVAL_SECONDS)
        return now - self.last_line >= interval

    def _stats(self, now: float) -> list[str]:
        count = _format_counter(self.done, self.total, self.unit)
        mean = (self.done - self.start) / (now - self.began) if now > self.began else None
        speed = mean if self.done >= self.total else self.speed.per_second(now)
        rate = f"{_format_rate(speed * self.each)} {self.rate}/s" if speed and self.rate else ""
        return [part for part in (count, rate, self.details) if part]

    def _percent(self) -> str:
        """Return the percentage, rounded down so that only finished work shows 100 %."""
        return f"{100 * self.done // self.total if self.total else 100} %"

    def _time(self, now: float) -> str:
        if self.done >= self.total:
            return f"took {format_duration(now - self.began)}"
        speed = self.speed.per_second(now)
        return (
            f"{format_duration((self.total - self.done) / speed)} left"
            if speed
            else f"{format_duration(now - self.began)} so far"
        )

    def _render(self) -> "Group":
        """Return two lines of at most 60 columns: percentage and time left, then the other numbers."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = self.clock()
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(no_wrap=True, overflow="ellipsis", max_width=30)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True, justify="right", min_width=5)
        top.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=self.total or 1, completed=self.done if self.total else 1)
        share, time_left = Text(self._percent(), "progress.percentage"), Text(self._time(now), "progress.remaining")
        top.add_row(Text(self.label, "bold"), bar, share, time_left)
        return Group(top, Text(f"  {', '.join(self._stats(now))}", no_wrap=True, overflow="ellipsis"))


def _redirect_logs(before: TextIO, after: TextIO) -> None:
    """Redirect the log handlers that write to the stream `before` to the stream `after`.

    Each log handler, such as torch's, keeps the standard error stream that it was created with.
    """
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
    details: Callable[[], str] = str,
    where: str = "",
) -> Iterator[Callable[[], None]]:
    """Show the progress of work in other processes until the block ends.

    `count()` returns the amount done, and `details()` returns text to show next to it. The expected total may be too
    low, so the display is complete only when the block ends.

    Yields the function that starts the display, so that processes can be forked before the display's thread exists.
    """
    ended = threading.Event()
    with Bar(label, total, unit, count(), where=where) as bar:

        def poll() -> None:
            while not ended.wait(_POLL_SECONDS):
                bar.show(min(count(), max(total - 1, 0)), details())

        thread = threading.Thread(target=poll, daemon=True)
        try:
            yield thread.start
        finally:
            ended.set()
            if thread.ident:
                thread.join()
        bar.show(total)
