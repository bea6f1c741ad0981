"""What the tests of faults share; they name it in `pytest_plugins`."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from tests.train.launching import LIMIT_SECONDS, finish


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder for runs in this process, which then compute as processes with OMP_NUM_THREADS=1 do."""
    monkeypatch.chdir(tmp_path)
    # Measured after each checkpoint, it would take longer than the runs of these tests.
    monkeypatch.setattr("tinyllama.hardware.peak_flops", lambda device, precision: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(int(LIMIT_SECONDS))
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    torch.set_num_threads(threads)


def give_up(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"a test in this process took {LIMIT_SECONDS:g} s: a run that never ends?")


@pytest.fixture(scope="session")
def calm(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process to which nothing happened."""
    return finish(small, tmp_path_factory.mktemp("calm"))


@pytest.fixture(scope="session")
def calm_pair(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks to which nothing happened."""
    return finish(small, tmp_path_factory.mktemp("calm"), ranks=2)
