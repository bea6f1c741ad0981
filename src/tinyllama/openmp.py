"""Waiting of the OpenMP threads with which torch computes on a CPU."""

import os
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_SETTINGS = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
_SAMPLES, _SECONDS_BETWEEN_SAMPLES = 4, 0.005
_STAT = Path("/proc/stat")
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def choose_wait_policy(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep if other programs use the cores now. By default, they poll for milliseconds first.

    Polling is faster on free cores, and sleeping on busy cores (docs/log.md, "Waiting threads"). torch's OpenMP library
    reads the setting when torch is imported, so nothing changes afterwards. The user's own setting wins.
    """
    if "torch" in sys.modules or _SETTINGS & environment.keys():
        return
    others = running_threads() - 1
    if others > 0 and others + num_threads(environment) > (os.cpu_count() or 1):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def running_threads() -> int:
    """Return the number of threads of all processes that run or wait for a core: the lowest of a few samples.

    The number includes the calling thread. Sampling ends when no other thread runs, so that most imports do not wait.
    Without Linux's /proc/stat the result is 1.
    """
    lowest = sys.maxsize
    for _ in range(_SAMPLES):
        try:
            lowest = min(lowest, int(_STAT.read_text().partition("procs_running")[2].split()[0]))
        except (OSError, IndexError, ValueError):
            return 1
        if lowest == 1:
            break
        time.sleep(_SECONDS_BETWEEN_SAMPLES)
    return lowest


def num_threads(environment: Mapping[str, str]) -> int:
    """Return the number of threads that torch will start: OMP_NUM_THREADS, or the number of physical cores."""
    text = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if text.isdigit():
        return int(text)
    files = [Path(_SIBLINGS.format(cpu)) for cpu in os.sched_getaffinity(0)]
    return len({file.read_text() if file.is_file() else str(file) for file in files})
