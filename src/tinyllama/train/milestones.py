"""Releases of a run's milestones, made by one sidecar process after the other while training continues.

Training neither waits for a release nor stops when one fails: a failure is an event and is retried, except for wrong
input. Releases that are missing when a run ends are made when it resumes. The process computes on the CPU, because
training uses the GPUs.
"""

import contextlib
import threading
from collections.abc import Collection

import torch

from tinyllama.errors import INPUT_ERROR_STATUS
from tinyllama.formatting import echo
from tinyllama.progress import Bar
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.runs.sidecar import Sidecar

_MAX_TRIES = 3
"""Attempts per release; after that, the release is made when the run is started again."""
_RETRY_SECONDS = 10.0
"""Time before the first retry; it doubles before each later one."""


class ReleaseQueue:
    """Queue of the milestones to release, with a thread that runs one process per release."""

    def __init__(self, run: RunDir, log: RunLog, device: torch.device) -> None:
        self.run, self.log = run, log
        self.use_one_core = device.type == "cpu"  # training uses the others
        self.steps: list[int] = []
        self.failed: list[int] = []
        self.changed = threading.Condition()
        self.is_closed = threading.Event()
        self.sidecar: Sidecar | None = None
        self.thread = threading.Thread(target=self._run_queue, name="releases", daemon=True)
        self.thread.start()

    def __enter__(self) -> "ReleaseQueue":
        return self

    def __exit__(self, *error: object) -> None:
        """Kill the current process; its release is made when the run resumes."""
        self.is_closed.set()
        with self.changed:
            self.changed.notify_all()
            if self.sidecar:
                self.sidecar.kill()
        self.thread.join()

    def add(self, steps: Collection[int]) -> None:
        """Add the checkpoints of these steps to the queue."""
        with self.changed:
            self.steps += [step for step in steps if step not in self.steps]
            self.changed.notify_all()

    def finish(self) -> list[int]:
        """Wait for all releases; return the steps whose release failed at every attempt."""
        with self.changed:
            if total := len(self.steps):
                where = f"{self.run.path} is trained; releasing step {', '.join(map(str, self.steps))}"
                with Bar("releasing", total, "milestones", rate="", where=where) as bar:
                    while self.steps:
                        self.changed.wait(1)
                        bar.show(total - len(self.steps))
            return self.failed

    def _run_queue(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.steps or self.is_closed.is_set())
                if self.is_closed.is_set():
                    return
                step = self.steps[0]
            is_released = self._release(step)
            with self.changed:
                self.failed += [] if is_released else [step]
                self.steps.remove(step)
                self.changed.notify_all()

    def _release(self, step: int) -> bool:
        """Release a milestone with retries; return whether that succeeded."""
        for attempt in range(1, _MAX_TRIES + 1):
            try:
                status, problem = self._run_release_process(step)
            except OSError as error:  # the process could not be started
                status, problem = 1, repr(error)
            if status == 0:
                return True
            is_last = attempt == _MAX_TRIES or status == INPUT_ERROR_STATUS
            if not self.is_closed.is_set():
                retry = "it is retried when the run is started again" if is_last else f"try {attempt} of {_MAX_TRIES}"
                echo(f"{self.run.path}: the release of step {step} failed ({problem}); {retry}", to_stderr=True)
                with contextlib.suppress(OSError):  # a full disk may cause both failures
                    self.log.event("release-failed", step, problem=problem, tries=attempt)
            if is_last or self.is_closed.wait(_RETRY_SECONDS * 2 ** (attempt - 1)):
                break
        return False

    def _run_release_process(self, step: int) -> tuple[int, str]:
        """Run the process; return its exit status and the last line of its standard error."""
        with self.changed:
            if self.is_closed.is_set():
                return 1, "the run has ended"
            arguments = ("tinyllama.release.milestone", str(self.run.path), str(step))
            self.sidecar = Sidecar(*arguments, one_core=self.use_one_core)
        return self.sidecar.wait()
