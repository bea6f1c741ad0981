"""A pseudo terminal for tests: runs a program and returns the screen as pyte renders it."""

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path

import pyte

ROWS = 40


def run_on_terminal(
    command: Sequence[str | Path], folder: Path, columns: int, **variables: str
) -> tuple[int, list[str], bytes]:
    """Run a program on a terminal; return its exit status, the lines of the screen, and the bytes that it wrote."""
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **variables}
    environment.pop("COLUMNS", None)
    with subprocess.Popen(
        list(map(str, command)), cwd=folder, env=environment, stdin=child, stdout=child, stderr=child
    ) as process:
        os.close(child)
        written = _read_all(main)
    os.close(main)
    screen = pyte.Screen(columns, ROWS)
    pyte.ByteStream(screen).feed(written)
    return process.returncode, [line.rstrip() for line in screen.display if line.strip()], written


def _read_all(descriptor: int) -> bytes:
    data = b""
    while True:
        try:
            part = os.read(descriptor, 1 << 16)
        except OSError:  # the last process with the other end open has closed it
            return data
        if not part:
            return data
        data += part
