"""Child processes next to training: they use no GPU, and none outlives it.

The child runs this module as its program, which asks the kernel to kill it together with its parent before it imports
anything that takes seconds. A supervisor notices by a `Heartbeat` that a worker hangs.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from tinyllama.processes import set_parent_death_signal, sidecar_environment


class Sidecar:
    """A child process that runs `main(*arguments)` of a module."""

    def __init__(self, module: str, *arguments: str, one_core: bool, log: IO[bytes] | None = None) -> None:
        """Start the process, in its own session, so that signals to all processes of the run do not reach it.

        It computes on one core or on all. Its standard error goes to `log`, or is kept for `wait`. Raises OSError where
        it cannot be started.
        """
        program = [
            sys.executable,
            "-P",
            "-m",
            "tinyllama.runs.sidecar",
        ]  # -P: import nothing from the working directory
        self.process = subprocess.Popen(
            [*program, str(os.getpid()), module, *arguments],
            env=sidecar_environment(one_core),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log or subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def lines(self) -> Iterator[str]:
        """Yield the lines that it writes to standard output until it ends."""
        assert self.process.stdout is not None
        yield from self.process.stdout

    def wait(self) -> tuple[int, str]:
        """Wait until it ends; return its exit status and the last line of its standard error, if that is kept."""
        stderr = (self.process.communicate()[1] or "").strip()
        return self.process.returncode, stderr.splitlines()[-1] if stderr else f"status {self.process.returncode}"

    def close_stdin(self) -> None:
        """Tell it that training has ended."""
        stdin, self.process.stdin = self.process.stdin, None
        with suppress(OSError):  # the process has ended already
            if stdin:
                stdin.close()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()


class Heartbeat:
    """Sign of life of a worker, with the time since the last one, which a supervisor adds up.

    The supervisor counts its own waits, not a clock's time: a stopped and continued process does not look like one that
    hangs.
    """

    def __init__(self) -> None:
        self.silent_seconds, self.is_paused = 0.0, False

    def __call__(self) -> None:
        """Give a sign of life."""
        self.silent_seconds = 0.0

    def add_wait(self, seconds: float) -> float:
        """Add the time of a supervisor's wait, unless paused; return the time since the last sign of life."""
        if not self.is_paused:
            self.silent_seconds += seconds
        return self.silent_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count no time while the block runs, such as while a slow disk is read."""
        self.is_paused = True
        try:
            yield
        finally:
            self.silent_seconds, self.is_paused = 0.0, False


def main(parent: str, module: str, *arguments: str) -> int:
    """Run a module's `main` as a child of the process `parent`; return its exit status."""
    set_parent_death_signal(int(parent))
    status: int = importlib.import_module(module).main(*arguments)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
