"""Parts for tests of benchmarks/gpu.py: one ends well, and the others fail in different ways after their first row."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def complete(device: str) -> Iterator[dict[str, Any]]:
    yield {"check": "first", "found": 1234.5, "passed": True}
    yield {"check": "second", "note": "a|b", "passed": None}


def failed_check(device: str) -> Iterator[dict[str, Any]]:
    yield {"check": "first", "passed": False}


def nan(device: str) -> Iterator[dict[str, Any]]:
    yield {"check": "first", "error": float("nan"), "passed": True}


def error(device: str) -> Iterator[dict[str, Any]]:
    yield {"check": "first", "passed": True}
    raise ValueError("the second check failed")


def crash(device: str) -> Iterator[dict[str, Any]]:
    yield {"check": "first", "passed": True}
    os.kill(os.getpid(), signal.SIGSEGV)


def unnamed_signal(device: str) -> Iterator[dict[str, Any]]:
    yield {"check": "first", "passed": True}
    os.kill(os.getpid(), signal.SIGRTMIN + 3)


def partial_row(device: str) -> Iterator[dict[str, Any]]:
    yield {"check": "first", "passed": True}
    with Path(sys.argv[-2]).open("a") as file:
        file.write('{"check": "sec')
    os.kill(os.getpid(), signal.SIGKILL)


def hang(device: str) -> Iterator[dict[str, Any]]:
    yield {"check": "first", "passed": True}
    time.sleep(600)
