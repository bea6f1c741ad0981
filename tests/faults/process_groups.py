"""A command with all processes that it started: their roles, and signals to them.

A process belongs to a group by a variable in its environment. Its children inherit the variable, so also torchrun's
ranks are found, which have sessions of their own.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LIMIT_SECONDS = 300.0
"""Timeout of a command, after which it counts as hanging."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
_ROLES = {
    b"tinyllama.release.release": "release sidecar",
    b"tinyllama.tracking.trackers": "tracker",
    b"torch.distributed.run": "torchrun",
    b"multiprocessing": "helper",
}


class ProcessGroup:
    """A started command and all processes that came of it."""

    def __init__(self, process: "subprocess.Popen[str]", mark: bytes, output: Path) -> None:
        self.process, self.mark, self.output = process, mark, output
        self.is_torchrun = TORCHRUN[2] in str(process.args)

    def members(self) -> dict[int, str]:
        """Return the role of each living process by its id, including orphans."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark not in (environment := (entry / "environ").read_bytes().split(b"\0")):
                    continue
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found[int(entry.name)] = self._role(entry, environment)
            except OSError:  # the process has ended meanwhile
                continue
        return found

    def _role(self, entry: Path, environment: Sequence[bytes]) -> str:
        command = (entry / "cmdline").read_bytes()
        for part, role in _ROLES.items():
            if part in command:
                return role
        rank = next((word.partition(b"=")[2].decode() for word in environment if word.startswith(b"RANK=")), None)
        if rank is not None:
            return f"rank {rank}"
        return "the command" if int(entry.name) == self.process.pid else "worker"

    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait_for_orphans(self) -> None:
        """Wait until none of its processes is left. Raises AssertionError if one survives its parent."""
        deadline = time.monotonic() + 60
        while left := self.members():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.02)

    def kill(self) -> None:
        for number in (*self.members(), self.process.pid):
            send_signal(number, signal.SIGKILL)
        self.process.wait(LIMIT_SECONDS)


def send_signal(process: int, number: signal.Signals) -> bool:
    """Send a signal to a process; return False if the process has ended."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def start_group(command: Sequence[str], folder: Path) -> Iterator[ProcessGroup]:
    """Start a command in a folder; none of its processes outlives the block."""
    name, value, output_path = "PROCESS_GROUP", uuid.uuid4().hex, folder / "output.txt"
    with output_path.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {name: value, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )
    group = ProcessGroup(process, f"{name}={value}".encode(), output_path)
    try:
        yield group
    finally:
        group.kill()
