"""What a person sees: a real program on a pseudo terminal, whose screen pyte draws."""

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


def on_a_terminal(
    command: Sequence[str | Path], folder: Path, columns: int, **variables: str
) -> tuple[int, list[str], bytes]:
    """Run a program to its end on a terminal of so many columns; its status, the screen's lines, and the bytes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **variables}
    environment.pop("COLUMNS", None)
    with subprocess.Popen(
        list(map(str, command)), cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        written = _read_all(ours)
    os.close(ours)
    screen = pyte.Screen(columns, ROWS)
    pyte.ByteStream(screen).feed(written)
    return process.returncode, [line.rstrip() for line in screen.display if line.strip()], written


def _read_all(descriptor: int) -> bytes:
    found = b""
    while True:
        try:
            data = os.read(descriptor, 1 << 16)
        except OSError:  # the last who had the other end open has closed it
            return found
        if not data:
            return found
        found += data
