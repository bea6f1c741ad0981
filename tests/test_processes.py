"""Sidecars: processes next to training; stop signals."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyllama.errors import REQUEUE_STATUS, CommandAbort, run_and_get_exit_status
from tinyllama.processes import Heartbeat, exit_on_signal, record_signals, start_sidecar
from tinyllama.torch_versions import ALLOCATOR_VARIABLES

CHILD = "tests.sidecar_child"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))


def test_a_sidecar_has_no_rank_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    child = start_sidecar(CHILD, "environment", "RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", one_core=True)
    assert child.communicate()[0].splitlines() == ["None", "''", "'1'", str(os.getpriority(os.PRIO_PROCESS, 0))]
    assert child.returncode == 0


@pytest.mark.parametrize(
    ("threads", "is_under_torchrun", "expected"), [(None, False, 4), ("1", True, 4), ("1", False, 1), ("3", True, 3)]
)
def test_a_sidecar_next_to_gpus_has_the_lowest_priority_and_half_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, threads: str | None, is_under_torchrun: bool, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    for name, value in (("OMP_NUM_THREADS", threads), ("TORCHELASTIC_RUN_ID", "1" if is_under_torchrun else None)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    child = start_sidecar(CHILD, "sleep", one_core=False)
    with child:
        assert child.stdout is not None
        assert int(child.stdout.readline()) == child.pid
        process = Path(f"/proc/{child.pid}")
        assert process.joinpath("stat").read_text().rpartition(")")[2].split()[16] == "19"
        assert f"OMP_NUM_THREADS={expected}" in process.joinpath("environ").read_text().split("\0")
        child.kill()


@pytest.mark.parametrize("setting", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_allocator_grows_segments_unless_the_user_has_set_it(setting: str | None) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    if setting:
        variables[setting] = "max_split_size_mb:64"
    program = Path(__file__).with_name("allocator_program.py")
    found = subprocess.run([sys.executable, str(program)], env=variables, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == ("max_split_size_mb:64" if setting else "expandable_segments:True")


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


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as at the start of a program in the foreground."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_first_ctrl_c_is_recorded_and_the_second_is_a_keyboard_interrupt(interruptible: None) -> None:
    with record_signals() as signals:
        signals.can_save = True
        press_ctrl_c()
        assert signals.names == ["SIGINT"]
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_ctrl_c_reaches_the_ranks_of_torchrun_as_sigterm(
    interruptible: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with exit_on_signal(), record_signals() as signals:
        signals.can_save = True
        press_ctrl_c()
        with pytest.raises(CommandAbort):
            signal.raise_signal(signal.SIGTERM)
    with record_signals() as signals:  # without a Ctrl-C before it, SIGTERM is a request to save
        signal.raise_signal(signal.SIGTERM)
        assert signals.names == ["SIGTERM"]


def test_ctrl_c_with_nothing_to_save_aborts_the_command(interruptible: None) -> None:
    with exit_on_signal(), record_signals() as signals, pytest.raises(CommandAbort):
        press_ctrl_c()
    assert signals.names == []


def test_handlers_of_errors_do_not_continue_after_a_signal(interruptible: None) -> None:
    def command() -> None:
        with exit_on_signal(), contextlib.suppress(Exception):  # as around a call of a library
            signal.raise_signal(signal.SIGTERM)

    assert run_and_get_exit_status(command) == REQUEUE_STATUS


def test_background_process_still_ignores_ctrl_c(interruptible: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with exit_on_signal(), record_signals() as signals:
        press_ctrl_c()
        assert signals.names == []


def test_other_threads_install_no_handlers(interruptible: None) -> None:
    found = []

    def record() -> None:
        with exit_on_signal(), record_signals():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=record)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
