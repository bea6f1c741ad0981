"""A server that has imported torch and transformers, and runs a program in a fork for each request.

The imports take a new process seconds of CPU time. A fork runs a program with the requested arguments, environment,
folder and standard files. A crash ends only the fork.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyllama.errors import silence_torchao
from tinyllama.release import engines

ROOT = Path(__file__).parents[1]
SIDECAR_PROGRAM = str(Path(__file__).with_name("sidecar_program.py"))
START_NORMALLY = engines._run
_SERVERS: dict[int, str] = {}
"""Address of the server that a process has started. A fork of that process uses the same server."""


@contextmanager
def started_normally() -> Iterator[None]:
    """Start engine processes as the package does."""
    before, engines._run = engines._run, START_NORMALLY
    try:
        yield
    finally:
        engines._run = before


def run_in_fork(arguments: list[str], stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    """Replace `engines._run`: run the program of the engines in a fork of the server, which the first call starts."""
    status, stderr = _Fork(engines.__file__, arguments, stdin, dict(os.environ)).wait()
    return subprocess.CompletedProcess(arguments, status, b"", stderr)


class SidecarProcess:
    """Replacement of `subprocess.Popen` for a sidecar process, which runs in a fork."""

    def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
        assert command[3] == "tinyllama.processes"
        self.fork = _Fork(SIDECAR_PROGRAM, command[5:], b"", env)
        self.returncode: int | None = None

    def communicate(self) -> tuple[str, str]:
        self.returncode, stderr = self.fork.wait()
        return "", stderr.decode()

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.fork.pid, signal.SIGKILL)


class _Fork:
    """A program that runs in a fork of the server."""

    def __init__(self, program: str, arguments: list[str], stdin: bytes, environment: dict[str, str]) -> None:
        start()
        (address,) = _SERVERS.values()
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `wait`
        with tempfile.TemporaryFile() as given, socket.socket(socket.AF_UNIX) as server:
            given.write(stdin)
            given.seek(0)
            server.connect(f"\0{address}")
            request = json.dumps([program, arguments, environment, str(Path.cwd())]).encode() + b"\n"
            socket.send_fds(server, [request], [given.fileno(), *[self.stderr.fileno()] * 2])
            self.replies = server.makefile()
        self.pid = int(self.replies.readline())

    def wait(self) -> tuple[int, bytes]:
        """Wait for the program; return its exit status, or minus its signal's number, and its standard error."""
        with self.replies, self.stderr:
            status = int(self.replies.readline())
            self.stderr.seek(0)
            return status, self.stderr.read()


def start() -> None:
    """Start the server unless it runs; call this before forking processes that run engines."""
    if not _SERVERS:
        _SERVERS[os.getpid()] = start_server()


def start_server(*modules: str) -> str:
    """Start a server that imports these modules too; return its address. The server ends with this process."""
    address = f"tinyllama-fork-server-{os.getpid()}-{os.urandom(4).hex()}"
    command = [sys.executable, "-P", __file__, address, *modules]
    # Standard error is dropped, since log messages during imports belong to no test.
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    assert server.stdout.readline() == b"listening\n"
    atexit.register(_stop, server, os.getpid())
    return address


def _stop(server: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        server.kill()
        server.wait()


def _serve(address: str, *modules: str) -> None:
    """Import modules, then answer each connection in a fork."""
    silence_torchao()
    sys.path.append(str(ROOT))
    for module in ("transformers.generation", "transformers.models.llama.modeling_llama", *modules):
        importlib.import_module(module)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    _SERVERS[os.getpid()], engines._run = address, run_in_fork  # for programs that run engines
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that forks need not be waited for
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0{address}")
        listening.listen()
        print("listening", flush=True)
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(connection)
                os._exit(0)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Send the process ID of the requested program, and after its end its exit status."""
    message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    child = os.fork()
    if child == 0:
        connection.close()
        _run_program(files, *json.loads(message))
    connection.sendall(b"%d\n" % child)
    for file in files:
        os.close(file)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _run_program(
    files: list[int], program: str, arguments: list[str], environment: dict[str, str], folder: str
) -> None:
    status = 1
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.argv = [program, *arguments]
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        runpy.run_path(program, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
