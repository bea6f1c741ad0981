"""Releases of a run's milestones; sidecar processes make the releases one at a time while training continues.

Training neither waits for a release nor stops when a release fails. A failed release is logged as an event and retried,
unless its input is invalid. Releases that are missing when a run ends are made when the run resumes. The sidecar
processes use the CPU, because training uses the GPUs.
"""

import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from subprocess import Popen

import torch

from tinyllama.errors import INPUT_ERROR_STATUS
from tinyllama.formatting import echo
from tinyllama.processes import start_sidecar
from tinyllama.progress import Bar
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir

_MAX_TRIES = 3
"""Number of attempts per release. After the last attempt, the release is made when the run is started again."""
_RETRY_SECONDS = 10.0
"""Time before the first retry, in seconds. The time doubles with each further retry."""


class ReleaseQueue:
    """Queue of the milestones to release, with a thread that runs one process per release."""

    def __init__(self, run: RunDir, log: RunLog, device: torch.device) -> None:
        self.run, self.log = run, log
        self.use_one_core = device.type == "cpu"  # training uses the other cores
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="releases")
        self.futures: dict[int, Future[bool]] = {}
        self.lock, self.is_closed = threading.Lock(), threading.Event()
        self.sidecar: Popen[str] | None = None

    def __enter__(self) -> "ReleaseQueue":
        return self

    def __exit__(self, *error: object) -> None:
        """Kill the current sidecar process; its release is made when the run is started again."""
        with self.lock:
            self.is_closed.set()
            if self.sidecar:
                self.sidecar.kill()
        self.executor.shutdown(cancel_futures=True)

    def add(self, steps: Collection[int]) -> None:
        """Add the checkpoints of these steps to the queue."""
        for step in steps:
            if step not in self.futures or self.futures[step].done():
                self.futures[step] = self.executor.submit(self._release, step)

    def finish(self) -> list[int]:
        """Wait for all releases; return the steps whose release failed at every attempt."""
        pending = {step: future for step, future in self.futures.items() if not future.done()}
        if pending:
            where = f"{self.run.path} is trained; releasing step {', '.join(map(str, pending))}"
            with Bar("releasing", len(pending), "milestones", rate="", where=where) as bar:
                while (progress := wait(pending.values(), timeout=1)).not_done:
                    bar.show(len(progress.done))
                bar.show(len(pending))
        return [step for step, future in self.futures.items() if not future.result()]

    def _release(self, step: int) -> bool:
        """Release a milestone with retries; return whether the release succeeded."""
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
                with suppress(OSError):  # a full disk may cause the failure and prevent writing this event
                    self.log.event("release-failed", step, problem=problem, tries=attempt)
            if is_last or self.is_closed.wait(_RETRY_SECONDS * 2 ** (attempt - 1)):
                break
        return False

    def _run_release_process(self, step: int) -> tuple[int, str]:
        """Run the release process of a step; return its exit status and the last line of its standard error."""
        with self.lock:
            if self.is_closed.is_set():
                return 1, "the run has ended"
            arguments = ("tinyllama.release.release", str(self.run.path), str(step))
            self.sidecar = start_sidecar(*arguments, one_core=self.use_one_core)
        stderr, status = self.sidecar.communicate()[1].strip(), self.sidecar.returncode
        return status, stderr.splitlines()[-1] if stderr else f"status {status}"
