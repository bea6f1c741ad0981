"""A command in a child of this process, which has torch imported already, with a fault planted before it begins."""

import ctypes
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tinyllama import cli

LIMIT_SECONDS = 120
"""After these the child is ended by SIGALRM, so that no test waits for ever."""
_CAPABILITIES_VERSION = 0x20080522

Fault = Callable[[], object]
Command = tuple[tuple[object, ...], str | Path]
"""A command line, and the file or folder that it is about."""


class CommandResult(NamedTuple):
    """How a child ended: its exit status, or minus the signal's number; and all that it said."""

    status: int
    said: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("tinyllama: ")]


def run_command(folder: Path, *words: object, fault: Fault = lambda: None) -> CommandResult:
    """Run a command line in a folder, in a child, with a fault planted."""
    return run_in_fork(lambda: cli.main([*map(str, words), "--quiet"]), folder, fault)


def run_in_fork(call: Callable[[], int], folder: Path, fault: Fault = lambda: None) -> CommandResult:
    """Call something in a child of this process; its value is the status, an exception a traceback and 99."""
    with tempfile.TemporaryFile("w+") as said:
        number = os.fork()
        if number == 0:
            _run_child(call, folder, fault, said.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        said.seek(0)
        return CommandResult(status, said.read())


def _run_child(call: Callable[[], int], folder: Path, fault: Fault, output: int) -> None:
    status = 99
    try:
        signal.alarm(LIMIT_SECONDS)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout = sys.stderr = os.fdopen(os.dup(output), "w", buffering=1)
        os.chdir(folder)
        fault()
        status = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def kill_at_write(part: str, what: signal.Signals = signal.SIGKILL) -> Fault:
    """Be killed when a file whose path has `part` in it is about to be flushed to disk, half of it written."""

    def plant() -> None:
        fsync = os.fsync

        def planted(fd: int) -> None:
            if part in str(Path(f"/proc/self/fd/{fd}").readlink()):
                if not os.path.isdir(f"/proc/self/fd/{fd}"):  # noqa: PTH112 - a descriptor's
                    os.truncate(f"/proc/self/fd/{fd}", os.fstat(fd).st_size // 2)
                os.kill(os.getpid(), what)
            fsync(fd)

        signal.signal(what, signal.SIG_DFL) if what != signal.SIGKILL else None
        os.fsync = planted  # type: ignore[assignment]

    return plant


def drop_privileges() -> None:
    """Be bound by the modes of files, also where it is root that runs the tests."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0


def enter_namespaces(namespaces_of: int, folder: Path) -> Fault:
    """Be in the mounts that another process sees, in a folder there."""

    def plant() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for kind in ("user", "mnt"):
            with Path(f"/proc/{namespaces_of}/ns/{kind}").open() as file:
                assert libc.setns(file.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        os.chdir(folder)

    return plant


def assert_one_line(ended: CommandResult, *words: object, status: Sequence[int] = (2,)) -> None:
    """It ended with that status and one line, which has the words in it."""
    assert ended.status in status, ended.said
    assert "Traceback" not in ended.said, ended.said
    (line,) = ended.error_lines
    for word in words:
        assert str(word) in line, line
