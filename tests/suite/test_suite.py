"""`make test` never hides a crash, and each test has a time limit."""

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from tests.release.native import run_in_child

ROOT = Path(__file__).parents[2]
TIMEOUT = re.compile(r"mark\.timeout\((\d+)\)")


def make_test(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command of `make test` with these arguments instead of on all tests."""
    recipe = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (line,) = [line for line in recipe.splitlines() if " -m pytest " in line]
    command = [sys.executable, *shlex.split(line)[1:], *words]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # The time limit is far below the duration of busy.py.
    return subprocess.run(command, cwd=ROOT, env=ours, check=False, capture_output=True, text=True, timeout=150)


@pytest.mark.slow
def test_crashed_process_ends_run_and_reports_test() -> None:
    done = make_test("tests/suite/examples/crash.py", "tests/suite/examples/busy.py")
    assert done.returncode == 1
    assert "FAILED tests/suite/examples/crash.py::test_that_crashes" in done.stdout
    assert "Segmentation fault" in done.stderr
    assert "passed" not in done.stdout  # busy.py had not ended


@pytest.mark.slow
def test_hanging_native_code_ends_run_and_reports_test() -> None:
    done = make_test("tests/suite/examples/hang.py", "--timeout", "4", "--override-ini", "faulthandler_timeout=8")
    assert done.returncode == 1
    assert "FAILED tests/suite/examples/hang.py::test_that_hangs" in done.stdout
    assert "in test_that_hangs" in done.stderr  # in the stack


def test_every_test_has_a_time_limit() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    marks = [int(found) for path in ROOT.glob("tests/**/*.py") for found in TIMEOUT.findall(path.read_text())]
    assert 0 < options["timeout"] < min(marks)
    assert max(marks) < options["faulthandler_timeout"]


@pytest.mark.slow
def test_crash_prone_library_in_process_fails_test() -> None:
    done = make_test("tests/suite/examples/in_process.py")
    assert done.returncode == 1
    assert "ERROR tests/suite/examples/in_process.py::test_that_imports_an_engine" in done.stdout
    assert "1 error" in done.stdout  # only in the test that imported it


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_crash_in_child_process_fails_only_its_test() -> None:
    with pytest.raises(BrokenProcessPool):
        run_in_child(crash)
    assert run_in_child(os.getpid) != os.getpid()
