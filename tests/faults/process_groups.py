"""A command as a group of real processes: who they are, what they are doing, and a signal to one of them.

Reads /proc and the files that the command writes. A process belongs to a group by a variable in its environment, which
its children inherit, so that those of torchrun, which have sessions of their own, are found too.
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
"""A life that takes longer is taken for one that hangs."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
_ROLES = {
    b"tinyllama.release.milestone": "release beside training",
    b"tinyllama.tracking.trackers": "tracker",
    b"torch.distributed.run": "torchrun",
    b"multiprocessing": "helper",
}


class ProcessGroup:
    """A command that was started, and all the processes that came of it."""

    def __init__(self, process: "subprocess.Popen[str]", mark: bytes, said: Path) -> None:
        self.process, self.mark, self.said = process, mark, said
        self.is_torchruns = TORCHRUN[2] in str(process.args)

    def members(self) -> dict[int, str]:
        """Role of each living process, by its number; also of those whose parent is dead."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark not in (environment := (entry / "environ").read_bytes().split(b"\0")):
                    continue
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found[int(entry.name)] = self._role(entry, environment)
            except OSError:  # it has ended meanwhile
                continue
        return found

    def _role(self, entry: Path, environment: Sequence[bytes]) -> str:
        command = (entry / "cmdline").read_bytes()
        for sign, role in _ROLES.items():
            if sign in command:
                return role
        rank = next((word.partition(b"=")[2].decode() for word in environment if word.startswith(b"RANK=")), None)
        if rank is not None:
            return f"rank {rank}"
        return "the command" if int(entry.name) == self.process.pid else "worker"

    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait_for_orphans(self) -> None:
        """Wait until none of its processes is there any more; AssertionError where one works on without its parent."""
        deadline = time.monotonic() + 60
        while left := self.members():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.02)

    def kill(self) -> None:
        for number in (*self.members(), self.process.pid):
            send_signal(number, signal.SIGKILL)
        self.process.wait(LIMIT_SECONDS)


def send_signal(number: int, what: signal.Signals) -> bool:
    """Send a signal to a process; False where it has ended."""
    try:
        os.kill(number, what)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def start_group(command: Sequence[str], folder: Path) -> Iterator[ProcessGroup]:
    """Start a command in a folder; none of its processes outlives the block."""
    mark, said = f"LIFE={uuid.uuid4().hex}", folder / "said.txt"
    name, _, value = mark.partition("=")
    with said.open("w") as output:
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
    group = ProcessGroup(process, mark.encode(), said)
    try:
        yield group
    finally:
        group.kill()
