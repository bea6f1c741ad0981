"""Tests that never end: in Python, and in native code that holds the interpreter lock and ignores signals."""

import ctypes
import time
from collections.abc import Callable

import pytest


def python() -> None:
    time.sleep(600)


def native() -> None:
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)  # PyDLL keeps the interpreter lock
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)


@pytest.mark.parametrize("hang", [python, native], ids=["python", "native"])
def test_that_hangs(hang: Callable[[], None]) -> None:
    hang()


def test_that_runs_next() -> None:
    pass
