"""Sidecars: processes next to training."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllama.processes import Heartbeat, start_sidecar

CHILD = "tests.sidecar_child"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))


def test_a_sidecar_has_no_rank_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    child = start_sidecar(CHILD, "environment", "RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", one_core=True)
    assert child.communicate()[0].splitlines() == ["None", "''", "'1'"]
    assert child.returncode == 0


def test_a_sidecar_ends_when_its_input_ends() -> None:
    child = start_sidecar(CHILD, "fail", "no luck", one_core=True)
    assert child.communicate() == ("", "no luck\n")
    assert child.returncode == 3


def test_a_sidecar_dies_with_its_parent() -> None:
    command = [sys.executable, "-m", CHILD, "parent"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """Return whether a process exists and is no zombie."""
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_heartbeat_adds_up_waits_without_a_sign_of_life() -> None:
    heartbeat = Heartbeat()
    assert [heartbeat.add_wait(2.0), heartbeat.add_wait(2.0)] == [2.0, 4.0]
    heartbeat()
    assert heartbeat.add_wait(1.0) == 1.0
    with heartbeat.paused():
        assert heartbeat.add_wait(9.0) == 1.0
    assert heartbeat.silent_seconds == 0.0
