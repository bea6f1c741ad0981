"""Runs of real processes, alone or under torchrun, that leave nothing behind; and what a run left on disk.

One that is alone, and torchrun itself, are forked by a process that has imported torch, which would take them longer
than their steps do. Torchrun starts its ranks as usual.
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
from tests.train import planting
from tests.train.planting import GO, Fault, marker

from tinyllama.data.batches import batch_of_step
from tinyllama.data.store import TokenStore
from tinyllama.loading import load_model
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir

PLANTING = Path(__file__).with_name("planting.py")
LIMIT_SECONDS = 200.0
"""A life that takes longer is ended: far more than one needs, so that CI never hangs."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tinyllama.cli", "tinyllama.train.loop", "torch.distributed.run"])


def fault(recipe: Recipe, what: str, batch: int, row: int) -> Fault:
    """A fault at a row of a batch, which the model meets nowhere else; on 2 ranks rows 0 to 2 are rank 0's."""
    store = TokenStore.open(recipe.data.store)
    return {"do": what, "row": batch_of_step(recipe, store, batch)[row, :-1].tolist()}


class Forked:
    """A training, or the torchrun of one, forked from a process that has imported torch.

    `torchrun` holds the options of torchrun. The methods are those of `subprocess.Popen`.
    """

    def __init__(
        self,
        command: list[str],
        folder: Path,
        variables: dict[str, str],
        output: Path,
        torchrun: Sequence[str] | None = None,
    ) -> None:
        self.process = FORKS.Process(target=_live, args=(command, folder, variables, output, torchrun))
        self.process.start()
        self.pid = self.process.pid or 0
        self.kill = self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("tinyllama", timeout)
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def _live(
    command: list[str], folder: Path, variables: dict[str, str], output: Path, torchrun: Sequence[str] | None
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.argv = [str(PLANTING), *command]
    with output.open("a") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    if torchrun is None:
        sys.exit(planting.main())
    from torch.distributed.run import main

    main(["--standalone", *torchrun, *sys.argv])


class Life:
    """A launched training, be it one process or a torchrun with its workers."""

    def __init__(self, process: Forked, mark: str, folder: Path, output: Path) -> None:
        self.process, self.mark, self.folder, self.output = process, mark, folder, output
        self.run = folder / "runs/small"

    def workers(self) -> dict[int, int]:
        """Process id of each living rank, by rank; also of those whose launcher is dead."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile
                continue
            if self.mark.encode() in variables:
                rank = next((name.partition(b"=")[2] for name in variables if name.startswith(b"RANK=")), None)
                found.update({int(rank): int(entry.name)} if rank else {})
        return found

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition; it is a failure where the process ends before, or time does."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if self.process.poll() is not None:
                assert condition(), f"ended with status {self.process.returncode} before {what}:\n{self.said()}"
                return
            assert time.monotonic() < deadline, f"in vain waited for {what}:\n{self.said()}"
            time.sleep(0.005)

    def wait_until_struck(self, planted: Fault) -> None:
        self.wait_until((self.folder / marker(planted)).exists, str(planted)[:40])

    def go(self) -> None:
        """Let go on what a `wait` fault holds."""
        (self.folder / GO).touch()

    def end(self) -> int:
        """Wait for its end; its exit status."""
        return self.process.wait(LIMIT_SECONDS)

    def said(self) -> str:
        return self.output.read_text()

    def complaints(self) -> list[str]:
        """The lines on standard error that are tinyllama's own."""
        return [line for line in self.said().splitlines() if line.startswith("tinyllama: ")]

    def kill(self) -> None:
        """End whatever is left of it."""
        for number in (*self.workers().values(), self.process.pid):
            try:
                os.killpg(number, signal.SIGKILL)  # each worker of a torchrun leads a session of its own
            except ProcessLookupError:
                continue
        self.process.kill()  # where it had not come to lead a session yet
        self.process.wait(LIMIT_SECONDS)


@contextmanager
def launched(
    small: Path, folder: Path, *flags: str, ranks: int = 1, faults: Sequence[Fault] = (), options: Sequence[str] = ()
) -> Iterator[Life]:
    """Train the small recipe in `folder`: in one process, or in `ranks` under a torchrun with `options`."""
    folder.mkdir(exist_ok=True)
    mark = f"LAUNCH={uuid.uuid4().hex}"
    variables = {"OMP_NUM_THREADS": "1", "FAULTS": json.dumps(list(faults)), "LAUNCH": mark.removeprefix("LAUNCH=")}
    command = ["train", str(small / "recipe.yaml"), *flags]
    with tempfile.NamedTemporaryFile("w", suffix=".said") as said:  # not in the folder, whose disk may be full
        torchrun = None if ranks == 1 else [f"--nproc_per_node={ranks}", *options]
        process = Forked(command, folder, variables, Path(said.name), torchrun)
        life = Life(process, mark, folder, Path(said.name))
        try:
            yield life
        finally:
            life.kill()


def finish(
    small: Path, folder: Path, *flags: str, ranks: int = 1, faults: Sequence[Fault] = (), options: Sequence[str] = ()
) -> Path:
    """Train to the end; the run's folder."""
    with launched(small, folder, *flags, ranks=ranks, faults=faults, options=options) as life:
        assert life.end() == 0, life.said()
    return life.run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run).state_dict()


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return list(RunDir(run).metrics())


def has_rows(run: Path, count: int) -> bool:
    return len(rows_of(run)) >= count


def losses_of(run: Path) -> list[tuple[int, float | None]]:
    """Step and loss of each row: the same as another run's, each step stands once and learnt the same."""
    return [(row["step"], row["loss"]) for row in rows_of(run)]


def events_of(run: Path, *names: str) -> list[dict[str, Any]]:
    return [row for row in RunDir(run).events() if not names or row["event"] in names]


def without_space() -> bool:
    """Whether a disk that is full can be had here: a tmpfs in a namespace of its own."""
    return shutil.which("unshare") is None or bool(subprocess.run(["unshare", "-rm", "true"], check=False).returncode)


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """The path, seen from here, of an empty disk of `size` that lies at `place` in a namespace of its own."""
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
