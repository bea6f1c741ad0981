"""Training runs as real processes, alone or under torchrun, and readers of what a run left on disk.

Processes are forked from a server that has imported torch, because the import takes longer than their steps. torchrun
starts its ranks as usual. No process outlives its test.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tests.conftest import cannot_run
from tests.data.reading import batch_of_step
from tests.train import fault_injection
from tests.train.fault_injection import RESUME_FILE, Fault, marker_path

from tinyllama.data.store import TokenStore
from tinyllama.loading import load_model
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir

INJECTION_PROGRAM = Path(__file__).with_name("fault_injection.py")
LIMIT_SECONDS = 200.0
"""Timeout of a process: far more than one needs, so that CI never hangs."""
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["tinyllama.cli", "tinyllama.train.loop", "torch.distributed.run"])


def fault_in_batch(recipe: Recipe, what: str, batch: int, row: int) -> Fault:
    """Return a fault at a sequence of a batch, which occurs nowhere else; on 2 ranks rows 0 to 2 are rank 0's."""
    store = TokenStore.open(recipe.data.store)
    return {"do": what, "row": batch_of_step(recipe, store, batch)[row, :-1].tolist()}


def _run_forked(
    command: list[str], folder: Path, variables: dict[str, str], output: Path, torchrun: Sequence[str] | None
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.argv = [str(INJECTION_PROGRAM), *command]
    with output.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if torchrun is None:
        sys.exit(fault_injection.main())
    from torch.distributed.run import main

    main(["--standalone", *torchrun, *sys.argv])


class TrainingProcess:
    """A training run, forked from the server: one process, or torchrun with its ranks."""

    def __init__(
        self, command: list[str], folder: Path, faults: Sequence[Fault], output: Path, torchrun: Sequence[str] | None
    ) -> None:
        launch = uuid.uuid4().hex
        self.mark, self.folder, self.output_path, self.run = f"LAUNCH={launch}", folder, output, folder / "runs/small"
        variables = {"OMP_NUM_THREADS": "1", "FAULTS": json.dumps(list(faults)), "LAUNCH": launch}
        self.process = FORK_SERVER.Process(target=_run_forked, args=(command, folder, variables, output, torchrun))
        self.process.start()
        self.pid = self.process.pid or 0

    def workers(self) -> dict[int, int]:
        """Return the process id of each living rank, including those whose launcher is dead."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # the process has ended meanwhile
                continue
            if self.mark.encode() in variables:
                rank = next((name.partition(b"=")[2] for name in variables if name.startswith(b"RANK=")), None)
                found.update({int(rank): int(entry.name)} if rank else {})
        return found

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition; fail if the process ends first or the timeout passes."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if self.process.exitcode is not None:
                assert condition(), f"ended with status {self.process.exitcode} before {what}:\n{self.output()}"
                return
            assert time.monotonic() < deadline, f"timeout while waiting for {what}:\n{self.output()}"
            time.sleep(0.005)

    def wait_until_injected(self, fault: Fault) -> None:
        self.wait_until((self.folder / marker_path(fault)).exists, str(fault)[:40])

    def resume_waiting(self) -> None:
        """Release the processes that a `wait` fault holds."""
        (self.folder / RESUME_FILE).touch()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        """Wait for the end of the process; return its exit status."""
        self.process.join(LIMIT_SECONDS)
        assert self.process.exitcode is not None, self.output()
        return self.process.exitcode

    def output(self) -> str:
        return self.output_path.read_text()

    def error_lines(self) -> list[str]:
        """Return the error messages of tinyllama on standard error."""
        return [line for line in self.output().splitlines() if line.startswith("tinyllama: ")]

    def kill(self) -> None:
        """Kill all processes that are left."""
        for number in (*self.workers().values(), self.pid):
            try:
                os.killpg(number, signal.SIGKILL)  # each worker of torchrun leads a session of its own
            except ProcessLookupError:
                continue
        self.process.kill()  # in case it did not lead a session yet
        self.process.join(LIMIT_SECONDS)


@contextmanager
def start_training(
    small: Path, folder: Path, *flags: str, ranks: int = 1, faults: Sequence[Fault] = (), options: Sequence[str] = ()
) -> Iterator[TrainingProcess]:
    """Train the small recipe in `folder` with faults: in one process, or in `ranks` under torchrun with `options`."""
    folder.mkdir(exist_ok=True)
    command = ["train", str(small / "recipe.yaml"), *flags]
    torchrun = None if ranks == 1 else [f"--nproc_per_node={ranks}", *options]
    with tempfile.NamedTemporaryFile("w", suffix=".output") as output:  # not in the folder, whose disk may be full
        training = TrainingProcess(command, folder, faults, Path(output.name), torchrun)
        try:
            yield training
        finally:
            training.kill()


def train_to_end(
    small: Path, folder: Path, *flags: str, ranks: int = 1, faults: Sequence[Fault] = (), options: Sequence[str] = ()
) -> Path:
    """Train to the last step; return the run's folder."""
    with start_training(small, folder, *flags, ranks=ranks, faults=faults, options=options) as training:
        assert training.end() == 0, training.output()
    return training.run


def load_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run).state_dict()


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = load_weights(one), load_weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs logged each step once, with the same losses, and ended with the same weights."""
    assert read_losses(one) == read_losses(other)
    assert same_weights(one, other)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return list(RunDir(run).metrics())


def has_metrics(run: Path, count: int) -> bool:
    return len(read_metrics(run)) >= count


def read_losses(run: Path) -> list[tuple[int, float | None]]:
    """Return step and loss of each row of metrics."""
    return [(row["step"], row["loss"]) for row in read_metrics(run)]


def read_events(run: Path, *names: str) -> list[dict[str, Any]]:
    return [row for row in RunDir(run).events() if not names or row["event"] in names]


def event_steps(run: Path, *names: str) -> list[int]:
    return [row["step"] for row in read_events(run, *names)]


@contextmanager
def mount_small_disk(place: Path, size: str) -> Iterator[Path]:
    """Mount an empty disk of `size` at `place` in a namespace of its own; yield the path of the disk seen from here."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        cannot_run("needs a mount namespace for a small disk")
    place.mkdir(parents=True)
    script = 'mount -t tmpfs -o size="$1" none "$2" && echo mounted && exec cat'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", size, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "mounted\n"
            yield Path(f"/proc/{holder.pid}/root{place}")
        finally:
            holder.kill()
