"""A test that hangs in native code, which holds the interpreter lock and never handles a signal."""

import ctypes


def test_that_hangs() -> None:
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)  # PyDLL keeps the interpreter lock
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)
