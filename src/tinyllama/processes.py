"""Sidecar processes, parent-death and stop signals, and torch's compile cache and allocator.

A sidecar runs this module as its program. Before any slow import, the program asks the kernel to kill the sidecar when
training ends. The module does not import torch.
"""

import atexit
import ctypes
import getpass
import importlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from tinyllama.errors import CommandAbort, CommandStopped
from tinyllama.torch_versions import ALLOCATOR_VARIABLES

_LOWEST_PRIORITY = 19
_REQUEUE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def set_parent_death_signal(parent: int | None = None) -> None:
    """Make the kernel kill this process when its parent ends, so that no orphan is active during the next run.

    If the process with the ID `parent` has already ended, this process ends immediately.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def die_with_torchrun() -> None:
    """Make a rank end when torchrun ends; the rank would otherwise continue, because it has its own session."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal()


def start_sidecar(module: str, *arguments: str, one_core: bool, log: IO[bytes] | None = None) -> subprocess.Popen[str]:
    """Start a sidecar process that runs `main(*arguments)` of a module.

    The process is not a rank and uses no GPU. With `one_core`, it computes with one thread. Otherwise, it has the
    lowest priority, and one thread for every second core unless the user has set OMP_NUM_THREADS. The process has its
    own session, so it does not receive signals to the process group of training. Its standard error is written to
    `log`, or to a pipe if `log` is None. Raises OSError if the process cannot be started.
    """
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    threads = os.environ.get("OMP_NUM_THREADS")
    if one_core:
        threads = "1"
    elif threads is None or (threads == "1" and "TORCHELASTIC_RUN_ID" in os.environ):  # torchrun's default is 1
        threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
    process = subprocess.Popen(
        # -P: import nothing from the working directory
        [sys.executable, "-P", "-m", "tinyllama.processes", str(os.getpid()), module, *arguments],
        env={name: value for name, value in os.environ.items() if name not in ranks} | own,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log or subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if not one_core:
        os.setpriority(os.PRIO_PROCESS, process.pid, _LOWEST_PRIORITY)
    return process


class Heartbeat:
    """Heartbeats of a worker, and the time since the last heartbeat in seconds.

    The supervisor adds up its own waiting times instead of reading a clock. A process that was suspended and continued
    therefore does not look hung.
    """

    def __init__(self) -> None:
        self.silent_seconds, self.is_paused = 0.0, False
        self.longest_seconds: float | None = None
        """Longest time between two heartbeats; None before the first heartbeat."""

    def __call__(self) -> None:
        """Record a heartbeat."""
        longest = self.longest_seconds
        self.longest_seconds = 0.0 if longest is None else max(longest, self.silent_seconds)
        self.silent_seconds = 0.0

    def add_wait(self, seconds: float) -> float:
        """Add a supervisor's waiting time, unless the heartbeat is paused; return the time since the last heartbeat."""
        if not self.is_paused:
            self.silent_seconds += seconds
        return self.silent_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time during the block, which may, for example, wait for a slow disk."""
        self.is_paused = True
        try:
            yield
        finally:
            self.silent_seconds, self.is_paused = 0.0, False


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Raise CommandStopped on SIGTERM or SIGUSR1, and CommandAbort on Ctrl-C, during the block of a command.

    Except in a nested block of `record_signals`, the command must have nothing to save.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise CommandAbort
        raise CommandStopped(signal.Signals(number).name)

    with _stop_signal_handlers(stop):
        yield


class StopSignals:
    """The stop signals that this process received."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """Names of the signals that the main thread has recorded."""
        self.arrived: list[int] = []
        """Numbers of the signals, including those that a blocked main thread has not handled yet."""
        self.can_save = False
        """Whether the first Ctrl-C is recorded.

        It is false before the first step, when nothing can be saved: Ctrl-C then ends the block.
        """


@contextmanager
def record_signals(on_interrupt: Callable[[], None] = lambda: None) -> Iterator[StopSignals]:
    """Record SIGTERM, SIGUSR1 and the first Ctrl-C during the block instead of ending the process.

    The second Ctrl-C, and each Ctrl-C while `can_save` is false, has the effect that it had before the block. A thread
    calls `on_interrupt` when a Ctrl-C arrives that will be recorded, even if the main thread is blocked.
    """
    signals, previous = StopSignals(), signal.getsignal(signal.SIGINT)
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    # torchrun forwards the first Ctrl-C as SIGINT, and the second one as SIGTERM.
    repetitions = [signal.SIGINT, *([signal.SIGTERM] if "TORCHELASTIC_RUN_ID" in os.environ else [])]

    def handle(number: int, frame: FrameType | None) -> None:
        is_repeated = "SIGINT" in signals.names and number in repetitions
        is_abort = number == signal.SIGINT and (signals.arrived.count(number) > 1 or not signals.can_save)
        if callable(previous) and (is_repeated or is_abort):
            previous(signal.SIGINT, frame)
        else:
            signals.names.append(signal.Signals(number).name)

    def listen() -> None:
        while numbers := reader.recv(64):
            is_first = signal.SIGINT in numbers and signal.SIGINT not in signals.arrived
            signals.arrived.extend(number for number in numbers if number in (*_REQUEUE_SIGNALS, signal.SIGINT))
            if is_first and signals.can_save:
                on_interrupt()

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        with _stop_signal_handlers(handle, writer):
            yield signals
    finally:
        writer.close()  # ends the thread
        thread.join()
        reader.close()


@contextmanager
def _stop_signal_handlers(
    handler: Callable[[int, FrameType | None], None], wakeup: socket.socket | None = None
) -> Iterator[None]:
    """Handle SIGTERM (schedulers, torchrun), SIGUSR1 (Slurm, before its time limit) and Ctrl-C during the block.

    Ctrl-C is not handled if this process ignores SIGINT, as a background process of a shell script does. Python writes
    the number of each signal to `wakeup` when the signal arrives, before the main thread runs `handler`. Only the main
    thread can handle signals; in any other thread, this function does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [*_REQUEUE_SIGNALS, *([signal.SIGINT] if callable(signal.getsignal(signal.SIGINT)) else [])]
    previous = {number: signal.signal(number, handler) for number in numbers}
    previous_wakeup = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False) if wakeup else None
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)
        if previous_wakeup is not None:
            signal.set_wakeup_fd(previous_wakeup)


def user_cache_folder() -> Path:
    """Return the folder of this user's caches, below XDG_CACHE_HOME. Raises RuntimeError if the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "tinyllama"


def use_private_compile_cache() -> None:
    """Make torch.compile store its code in this user's cache folder instead of /tmp, which all users can write to.

    torch executes the code in its cache, by default `/tmp/torchinductor_USER`, and another user can create that folder
    first. Call this function before torch imports `torch._inductor`, which reads the environment variable. If the
    user's cache folder is not writable, the cache is a new temporary folder of this process.
    """
    if not _owns_shared_header_folder():
        os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    try:
        folder = user_cache_folder() / "torchinductor"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        folder = Path(tempfile.mkdtemp(prefix="tinyllama-torchinductor-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def use_expandable_segments() -> None:
    """Make torch's allocator grow segments of GPU memory, which prevents fragmentation; the user's setting wins.

    Call this function before the first allocation on a GPU.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ.update(dict.fromkeys(ALLOCATOR_VARIABLES, "expandable_segments:True"))


def _owns_shared_header_folder() -> bool:
    """Restrict the /tmp folder of torch's precompiled headers to this user; return whether the user owns the folder."""
    try:
        folder = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return False
        folder.chmod(0o700)
    except (OSError, KeyError):  # KeyError: the user ID has no name
        return False
    return True


def main(parent: str, module: str, *arguments: str) -> int:
    """Run the function `main` of a module in this sidecar of the process `parent`, and return the exit status."""
    set_parent_death_signal(int(parent))
    status: int = importlib.import_module(module).main(*arguments)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
