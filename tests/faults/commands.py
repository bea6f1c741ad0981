"""Commands run in a forked child, which has torch imported already, with a fault injected before the command starts."""

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
"""Timeout of the child, which SIGALRM then ends."""
_CAPABILITIES_VERSION = 0x20080522

Fault = Callable[[], object]
Command = tuple[tuple[object, ...], str | Path]
"""A command line, and the file or folder that its error must name."""


class CommandResult(NamedTuple):
    """Exit status of a child, or minus the number of the signal that ended it, and its output."""

    status: int
    output: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("tinyllama: ")]


def run_command(folder: Path, *arguments: object, fault: Fault = lambda: None) -> CommandResult:
    """Run a command line in a folder, in a child with a fault."""
    return run_in_fork(lambda: cli.main([*map(str, arguments), "--quiet"]), folder, fault)


def assert_succeeds(folder: Path, *arguments: object, fault: Fault = lambda: None) -> CommandResult:
    """Run a command line and assert that its exit status is 0."""
    result = run_command(folder, *arguments, fault=fault)
    assert result.status == 0, result.output
    return result


def run_in_fork(call: Callable[[], int], folder: Path, fault: Fault = lambda: None) -> CommandResult:
    """Call a function in a child of this process; it returns the status, and an exception gives 99 and a traceback."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            _run_child(call, folder, fault, output.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return CommandResult(status, output.read())


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


def kill_at_write(part: str, number: signal.Signals = signal.SIGKILL) -> Fault:
    """Return a fault that kills the process when a file with `part` in its path is half written, before its flush."""

    def inject() -> None:
        fsync = os.fsync

        def faulty_fsync(fd: int) -> None:
            if part in str(Path(f"/proc/self/fd/{fd}").readlink()):
                if not os.path.isdir(f"/proc/self/fd/{fd}"):  # noqa: PTH112 - a descriptor's
                    os.truncate(f"/proc/self/fd/{fd}", os.fstat(fd).st_size // 2)
                os.kill(os.getpid(), number)
            fsync(fd)

        if number != signal.SIGKILL:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.fsync = faulty_fsync  # type: ignore[assignment]

    return inject


def drop_privileges() -> None:
    """Make file modes apply to this process also if it runs as root."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0


def enter_namespaces(process: int, folder: Path) -> Fault:
    """Return a fault that enters the user and mount namespaces of a process, and a folder there."""

    def inject() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for kind in ("user", "mnt"):
            with Path(f"/proc/{process}/ns/{kind}").open() as file:
                assert libc.setns(file.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        os.chdir(folder)

    return inject


def assert_one_line(result: CommandResult, *parts: object, status: Sequence[int] = (2,)) -> None:
    """Assert that a command ended with one of these exit statuses and one error line that contains all parts."""
    assert result.status in status, result.output
    assert "Traceback" not in result.output, result.output
    (line,) = result.error_lines
    for part in parts:
        assert str(part) in line, line
