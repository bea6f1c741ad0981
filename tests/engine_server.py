"""Engine processes that are forked from a server which has imported transformers already.

An engine's process in release/isolation.py imports torch and transformers, which takes seconds of CPU time. Here it is
a fork of a server that has done so: it runs the same program, with the same arguments, input and environment, and a
crash still ends a process of its own. Tests of how the engines' processes are started use `started_normally`.
"""

import atexit
import ctypes
import io
import os
import pickle
import runpy
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

from tinyllama.release import engines, isolation

START_NORMALLY = isolation._run
_SERVERS: dict[int, str] = {}
"""The address of the server that a process has started. A fork of that process uses the same one."""


@contextmanager
def started_normally() -> Iterator[None]:
    """Start the engines' processes as the package does."""
    before, isolation._run = isolation._run, START_NORMALLY
    try:
        yield
    finally:
        isolation._run = before


def run_in_fork(arguments: list[str], given: bytes) -> subprocess.CompletedProcess[bytes]:
    """Replace `isolation._run`: run the program of the engines in a fork of the server, which the first call starts."""
    start()
    (address,) = _SERVERS.values()
    request = (engines.__file__, arguments, given, dict(os.environ), Path.cwd())
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"\0{address}")
        server.sendall(pickle.dumps(request))
        server.shutdown(socket.SHUT_WR)
        status, stderr = pickle.loads(_received(server))
    return subprocess.CompletedProcess(arguments, status, b"", stderr)


def start() -> None:
    """Start the server, unless it runs: a process whose forks run engines does so before it forks."""
    if not _SERVERS:
        _SERVERS[os.getpid()] = _start()


def _received(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def _start() -> str:
    """Start the server and return its address once it listens."""
    address = f"tinyllama-engines-{os.getpid()}-{os.urandom(4).hex()}"
    command = [sys.executable, "-P", __file__, address]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"listening\n"
    atexit.register(_stop, server, os.getpid())
    return address


def _stop(server: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        server.kill()
        server.wait()


def _serve(address: str) -> None:
    """Import what the engines need, then answer each connection in a fork."""
    import transformers.generation
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from tinyllama.noise import hush_torchao

    hush_torchao()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that nobody has to wait for the forks
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0{address}")
        listening.listen()
        print("listening", flush=True)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                connection.sendall(pickle.dumps(_answer(*pickle.loads(_received(connection)))))
                os._exit(0)
            connection.close()


def _answer(*request: Any) -> tuple[int, bytes]:
    """Return the exit status of an engine's process, or minus its signal's number, and its standard error."""
    with tempfile.TemporaryFile() as stderr:
        number = os.fork()
        if number == 0:
            _be_engine(stderr.fileno(), *request)
        status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        stderr.seek(0)
        return status, stderr.read()


def _be_engine(stderr: int, program: str, arguments: list[str], given: bytes, variables: Any, folder: Path) -> None:
    status = 1
    try:
        for descriptor in (1, 2):
            os.dup2(stderr, descriptor)
        sys.stdin = io.TextIOWrapper(io.BytesIO(given))
        sys.argv = [program, *arguments]
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        runpy.run_path(program, run_name="__main__")
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
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the tests' process
    _serve(sys.argv[1])
