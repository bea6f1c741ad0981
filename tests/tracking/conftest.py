"""A run of no steps yet, and its log."""

from pathlib import Path

import pytest
from tests.tracking.run_files import new_run

from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return new_run(tmp_path)[1]


@pytest.fixture
def run(log: RunLog) -> RunDir:
    return log.run
