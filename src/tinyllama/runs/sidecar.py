"""Child processes next to training, which use no GPU and never outlive training.

The child process runs this module as its program. Before any slow import, the program asks the kernel to kill the child
if the parent dies. A supervisor uses a `Heartbeat` to detect a hung worker.
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
        """Start the process in its own session, so that it receives no signals to training's process group.

        The process uses one core if `one_core` is true, and otherwise all cores. Standard error is written to `log`;
        without `log`, `wait` returns its last line. Raises OSError if the process cannot be started.
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
        """Yield the lines of the process's standard output until the process ends."""
        assert self.process.stdout is not None
        yield from self.process.stdout

    def wait(self) -> tuple[int, str]:
        """Wait until the process ends; return the exit status and, without `log`, the last line of standard error."""
        stderr = (self.process.communicate()[1] or "").strip()
        return self.process.returncode, stderr.splitlines()[-1] if stderr else f"status {self.process.returncode}"

    def close_stdin(self) -> None:
        """Signal the process that training has ended."""
        stdin, self.process.stdin = self.process.stdin, None
        with suppress(OSError):  # the process has ended already
            if stdin:
                stdin.close()

    def kill(self) -> None:
        """Kill the process immediately."""
        self.process.kill()


class Heartbeat:
    """Heartbeat of a worker, and the time since the last heartbeat, in seconds.

    The supervisor adds up its own waiting times instead of reading a clock. A process that was suspended and continued
    therefore does not look hung.
    """

    def __init__(self) -> None:
        self.silent_seconds, self.is_paused = 0.0, False

    def __call__(self) -> None:
        """Record a heartbeat."""
        self.silent_seconds = 0.0

    def add_wait(self, seconds: float) -> float:
        """Add a supervisor's waiting time, unless the heartbeat is paused; return the time since the last heartbeat."""
        if not self.is_paused:
            self.silent_seconds += seconds
        return self.silent_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count no time while the block runs, for example while the block reads a slow disk."""
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
