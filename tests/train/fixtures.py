"""What the tests of faults share; they name it in `pytest_plugins`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.train.launching import finish


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder for runs in this process, which then compute as processes with OMP_NUM_THREADS=1 do."""
    monkeypatch.chdir(tmp_path)
    # Measured after each checkpoint, it would take longer than the runs of these tests.
    monkeypatch.setattr("tinyllama.hardware.peak_flops", lambda device, precision: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def calm(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process to which nothing happened."""
    return finish(small, tmp_path_factory.mktemp("calm"))


@pytest.fixture(scope="session")
def calm_pair(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks to which nothing happened."""
    return finish(small, tmp_path_factory.mktemp("calm"), ranks=2)
