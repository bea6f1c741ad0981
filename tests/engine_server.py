"""Engine processes that are forked from a server, which has imported torch and transformers already.

Those imports take each engine process of release/engines.py seconds of CPU time. The fork runs the same program with
the same arguments, input and environment, and a crash ends only the fork. Tests of the start of engine processes use
`started_normally`. `Program` is the same for sidecar processes.
"""

import atexit
import contextlib
import io
import os
import pickle
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
from typing import Any

from tinyllama.errors import silence_torchao
from tinyllama.release import engines

START_NORMALLY = engines._run
_SERVERS: dict[int, str] = {}
"""The address of the server that a process has started. A fork of that process uses the same one."""


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
    status, stderr = _Fork(engines.__file__, arguments, stdin, dict(os.environ)).ended()
    return subprocess.CompletedProcess(arguments, status, b"", stderr)


class _Fork:
    """A program, as a path or as Python code, that runs in a fork of the server with the input `given`."""

    def __init__(self, program: str, arguments: list[str], given: bytes, variables: dict[str, str]) -> None:
        start()
        (address,) = _SERVERS.values()
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(f"\0{address}")
            server.sendall(pickle.dumps((program, arguments, given, variables, Path.cwd())))
            server.shutdown(socket.SHUT_WR)
            self.answers = server.makefile("rb")
        self.pid: int = pickle.load(self.answers)

    def ended(self) -> tuple[int, bytes]:
        """Wait for the program; return its exit status, or minus its signal's number, and its standard error."""
        with self.answers:
            status, stderr = pickle.load(self.answers)
        return status, stderr


class Program:
    """Replacement of `subprocess.Popen` for a sidecar process: `main` of a module, in a fork."""

    def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
        assert command[3] == "tinyllama.processes"
        # the server's fork is the parent, and no longer training
        code = "import os, sys; from tinyllama.processes import main\nsys.exit(main(str(os.getppid()), *sys.argv[1:]))"
        self.fork = _Fork(code, command[5:], b"", env)
        self.returncode: int | None = None

    def communicate(self) -> tuple[str, str]:
        self.returncode, stderr = self.fork.ended()
        return "", stderr.decode()

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.fork.pid, signal.SIGKILL)


def start() -> None:
    """Start the server unless it runs; call this before forking processes that run engines."""
    if not _SERVERS:
        _SERVERS[os.getpid()] = _start()


def _received(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def _start() -> str:
    """Start the server and return its address once it listens."""
    address = f"tinyllama-engines-{os.getpid()}-{os.urandom(4).hex()}"
    command = [sys.executable, "-P", __file__, address]
    # Standard error is dropped, since log messages during imports belong to no test. The server ends with this process.
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    assert server.stdout.readline() == b"listening\n"
    atexit.register(_stop, server, os.getpid())
    return address


def _stop(server: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        server.kill()
        server.wait()


def _serve(address: str) -> None:
    """Import the engines' libraries, then answer each connection in a fork."""
    silence_torchao()
    import transformers.generation
    import transformers.models.llama.modeling_llama  # noqa: F401
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
                _answer(connection, *pickle.loads(_received(connection)))
                os._exit(0)
            connection.close()


def _answer(connection: socket.socket, *request: Any) -> None:
    """Send the process ID of the program, and after its end its exit status and standard error."""
    with tempfile.TemporaryFile() as stderr:
        number = os.fork()
        if number == 0:
            connection.close()
            _be_program(stderr.fileno(), *request)
        connection.sendall(pickle.dumps(number))
        status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        stderr.seek(0)
        connection.sendall(pickle.dumps((status, stderr.read())))


def _be_program(stderr: int, program: str, arguments: list[str], given: bytes, variables: Any, folder: Path) -> None:
    status = 1
    try:
        for descriptor in (1, 2):
            os.dup2(stderr, descriptor)
        sys.stdin = io.TextIOWrapper(io.BytesIO(given))
        sys.argv = [program, *arguments]
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            exec(program, {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
