"""Waiting of OpenMP threads, as GNU's OpenMP library reports it when torch loads the library."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.train.torchrun import run_torchrun

from tinyllama.processes import start_sidecar

COMMAND = ("-m", "tinyllama", "generate", "missing", "prompt")  # loads torch, then finds no model
DEFAULT_SPINS = "300000"
PROGRAM = Path(__file__).with_name("openmp_program.py")


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def spin_counts(report: str) -> list[str]:
    """Return how often an idle thread polls before it sleeps, for each process that loaded the library."""
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", report)
    if not counts:
        pytest.skip("torch of this platform does not use GNU's OpenMP")
    return counts


def run_python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [COMMAND, (PROGRAM,)], ids=["command", "python"])
def test_idle_threads_sleep(arguments: tuple[str | Path, ...]) -> None:
    assert spin_counts(run_python(*arguments).stderr) == ["0"]


def test_idle_threads_of_a_sidecar_sleep() -> None:
    child = start_sidecar("tests.openmp_program", one_core=True)
    assert spin_counts(child.communicate()[1]) == ["0"]


def test_idle_threads_of_a_rank_sleep(tmp_path: Path) -> None:
    assert spin_counts(run_torchrun(tmp_path, 1, *COMMAND).stderr) == [DEFAULT_SPINS, "0"]  # torchrun, then the rank


@pytest.mark.parametrize(
    ("name", "value", "expected"), [("OMP_WAIT_POLICY", "ACTIVE", "30000000000"), ("GOMP_SPINCOUNT", "7", "7")]
)
def test_the_users_setting_wins(monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str) -> None:
    monkeypatch.setenv(name, value)
    assert spin_counts(run_python(PROGRAM).stderr) == [expected]


def test_the_environment_is_unchanged_if_torch_is_loaded_already() -> None:
    done = run_python(PROGRAM, "torch-first")
    assert spin_counts(done.stderr) == [DEFAULT_SPINS]
    assert done.stdout == "None\n"
