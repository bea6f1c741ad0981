"""Waiting of the OpenMP threads with which torch computes on a CPU."""

import os
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_SETTINGS = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
_SAMPLES, _SECONDS_BETWEEN_SAMPLES = 3, 0.002


def choose_wait_policy(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep if other programs use the cores now. By default, they poll for milliseconds first.

    Polling is faster on free cores, and sleeping on busy cores (docs/log.md, "Waiting threads"). torch's OpenMP library
    reads the setting when torch is imported, so nothing changes afterwards. The user's own setting wins.
    """
    if "torch" not in sys.modules and not _SETTINGS & environment.keys():
        cores = os.cpu_count() or 1
        if running_threads(Path("/proc/stat")) - 1 + num_threads(environment) > cores:
            environment["OMP_WAIT_POLICY"] = "PASSIVE"


def running_threads(stat: Path) -> int:
    """Return the number of threads of all processes that run or wait for a core: the lowest of a few samples.

    The number includes the calling thread. `stat` is Linux's /proc/stat; without this file the result is 1.
    """
    if not stat.is_file():
        return 1
    samples = []
    for _ in range(_SAMPLES):
        samples.append(int(stat.read_text().split("procs_running")[1].split()[0]))
        time.sleep(_SECONDS_BETWEEN_SAMPLES)
    return min(samples)


def num_threads(environment: Mapping[str, str]) -> int:
    """Return the number of threads that OpenMP will start: OMP_NUM_THREADS, or the number of available cores."""
    text = environment.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdigit() else len(os.sched_getaffinity(0))
