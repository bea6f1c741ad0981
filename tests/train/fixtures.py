"""Fixtures of tests that inject faults into training; test modules name this module in `pytest_plugins`."""

from pathlib import Path

import pytest
from tests.train.launch import train_to_end


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory for runs in this process."""
    monkeypatch.chdir(tmp_path)
    # Measured after each checkpoint, the peak would take longer than the runs of these tests.
    monkeypatch.setattr("tinyllama.hardware.peak_flops", lambda device, precision: None)
    return tmp_path


@pytest.fixture(scope="session")
def reference_run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process without faults."""
    return train_to_end(small, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def reference_run_2_ranks(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks without faults."""
    return train_to_end(small, tmp_path_factory.mktemp("reference"), ranks=2)
