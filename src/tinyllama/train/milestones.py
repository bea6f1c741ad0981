"""Releases at a run's milestones, made beside training: one at a time, each in a process of its own.

Training neither waits nor stops for them: a release that fails is an event and is tried again, unless its input is
wrong. Releases that a run did not make before it ended are made when it resumes. The process computes on the CPU, since
training has the GPUs.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Collection
from pathlib import Path

import torch

from tinyllama.errors import INPUT_ERROR_STATUS
from tinyllama.files import read_json, sha256_of
from tinyllama.formatting import echo
from tinyllama.processes import sidecar_environment
from tinyllama.progress import Bar
from tinyllama.runs import checkpoint
from tinyllama.runs.log import RunLog

_PROGRAM = """\
import sys
from tinyllama.processes import set_parent_death_signal
set_parent_death_signal(int(sys.argv.pop(1)))
from tinyllama.release.milestone import main
sys.exit(main(*sys.argv[1:]))
"""
# It asks to end with training before it imports anything that takes seconds.
_TRIES = 3
"""Of a release; after that it is left until the run is started again."""
_PAUSE_SECONDS = 10.0
"""Before the second try; before each later one twice that of the one before."""


def pending_milestones(run: Path) -> list[int]:
    """Steps whose checkpoint is a milestone's and which have no release with scores yet, oldest first."""
    path = run / "releases" / "releases.json"
    rows = read_json(path)["releases"] if path.is_file() else []
    complete = {(row["step"], row["commit"]) for row in rows if row["complete"]}
    marked = filter(checkpoint.is_marked_milestone, checkpoint.list_committed(run))
    found = ((checkpoint.step_of(folder), sha256_of(folder / checkpoint.COMMIT)) for folder in marked)
    return [step for step, commit in found if (step, commit) not in complete]


class ReleaseQueue:
    """Releases the milestones that it is given, in a thread that starts and watches a process for each."""

    def __init__(self, run: Path, journal: RunLog, device: torch.device) -> None:
        self.run, self.journal = run, journal
        self.environment = sidecar_environment(one_core=device.type == "cpu")
        self.steps: list[int] = []
        self.failed: list[int] = []
        self.changed = threading.Condition()
        self.closed = threading.Event()
        self.process: subprocess.Popen[str] | None = None
        self.thread = threading.Thread(target=self._run_queue, name="releases", daemon=True)
        self.thread.start()

    def __enter__(self) -> "ReleaseQueue":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, steps: Collection[int]) -> None:
        """Release these steps' checkpoints, after those before."""
        with self.changed:
            self.steps += [step for step in steps if step not in self.steps]
            self.changed.notify_all()

    def finish(self) -> list[int]:
        """Wait until all are done; return the steps whose release failed to the last try."""
        with self.changed:
            if total := len(self.steps):
                where = f"{self.run} is trained; releasing step {', '.join(map(str, self.steps))}"
                with Bar("releasing", total, "milestones", rate="", where=where) as bar:
                    while self.steps:
                        self.changed.wait(1)
                        bar.show(total - len(self.steps))
            return self.failed

    def close(self) -> None:
        """End the process under way; what it has not done is done when the run goes on."""
        self.closed.set()
        with self.changed:
            self.changed.notify_all()
            if self.process:
                self.process.kill()
        self.thread.join()

    def _run_queue(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.steps or self.closed.is_set())
                if self.closed.is_set():
                    return
                step = self.steps[0]
            is_released = self._release(step)
            with self.changed:
                self.failed += [] if is_released else [step]
                self.steps.remove(step)
                self.changed.notify_all()

    def _release(self, step: int) -> bool:
        for tries in range(1, _TRIES + 1):
            try:
                status, problem = self._run_release_process(step)
            except OSError as error:  # the process does not even start
                status, problem = 1, repr(error)
            if status == 0:
                return True
            is_last = tries == _TRIES or status == INPUT_ERROR_STATUS
            if not self.closed.is_set():
                self._report_failure(step, tries, problem, is_last)
            if is_last or self.closed.wait(_PAUSE_SECONDS * 2 ** (tries - 1)):
                break
        return False

    def _report_failure(self, step: int, tries: int, problem: str, is_last: bool) -> None:
        again = "not tried again until the run is started again" if is_last else f"try {tries} of {_TRIES}"
        echo(f"{self.run}: the release of step {step} failed, {again}: {problem}", to_stderr=True)
        with contextlib.suppress(OSError):  # what fills the disk fails the release and its event
            self.journal.event("release-failed", step, problem=problem, tries=tries)

    def _run_release_process(self, step: int) -> tuple[int, str]:
        """Run the process to its end; its exit status and the last line that it wrote to standard error."""
        command = [sys.executable, "-c", _PROGRAM, str(os.getpid()), str(self.run), str(step)]
        with self.changed:
            if self.closed.is_set():
                return 1, "the run has ended"
            # In a session of its own: a signal to all of the run's processes is for training alone.
            self.process = subprocess.Popen(
                command,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        lines, status = self.process.communicate()[1].strip().splitlines(), self.process.returncode
        return status, lines[-1] if lines else f"status {status}"


def checkpoints_to_keep(run: Path, average: int) -> set[Path]:
    """Checkpoints that a milestone's release still has to average, `average` of them: they must not be deleted."""
    whole = checkpoint.list_committed(run) if average > 1 else []
    needed: set[Path] = set()
    for number, folder in enumerate(whole, 1):
        is_released = (run / "releases" / folder.name / "release.json").is_file()
        if checkpoint.is_marked_milestone(folder) and not is_released:
            needed |= {*whole[max(0, number - average) : number]}
    return needed
