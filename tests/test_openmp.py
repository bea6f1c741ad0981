"""On busy cores, waiting OpenMP threads sleep, as GNU's OpenMP library reports when torch loads it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.conftest import cannot_run
from tests.train.torchrun import run_torchrun

from tinyllama import openmp
from tinyllama.processes import start_sidecar

COMMAND = ("-m", "tinyllama", "generate", "missing", "prompt")  # loads torch, then finds no model
DEFAULT_SPINS = "300000"
PROGRAM = Path(__file__).with_name("openmp_program.py")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*openmp._SETTINGS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """Run one process per core of the machine, with the lowest priority, so that other tests are not slowed."""
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            process = stack.enter_context(subprocess.Popen(["nice", "-n", "19", sys.executable, PROGRAM, "busy"]))
            stack.callback(process.kill)
        yield


def spin_counts(report: str) -> list[str]:
    """Return how often a waiting thread polls before it sleeps, for each process that loaded the library."""
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", report)
    if not counts:
        cannot_run("torch of this platform does not use GNU's OpenMP")
    return counts


def run_python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)


@pytest.mark.usefixtures("busy_cores")
@pytest.mark.parametrize(("arguments", "status"), [(COMMAND, 2), ((PROGRAM,), 0)], ids=["command", "python"])
def test_waiting_threads_sleep_on_busy_cores(arguments: tuple[str | Path, ...], status: int) -> None:
    done = run_python(*arguments)
    assert done.returncode == status, done.stderr
    assert spin_counts(done.stderr) == ["0"]


@pytest.mark.long
@pytest.mark.usefixtures("busy_cores")
def test_waiting_threads_of_a_sidecar_and_of_a_rank_sleep_on_busy_cores(tmp_path: Path) -> None:
    child = start_sidecar("tests.openmp_program", one_core=True)
    assert spin_counts(child.communicate()[1]) == ["0"]
    ranks = run_torchrun(tmp_path, 1, *COMMAND)
    assert spin_counts(ranks.stderr) == [DEFAULT_SPINS, "0"]  # torchrun, then the rank


@pytest.mark.usefixtures("busy_cores")
def test_the_environment_is_unchanged_if_torch_is_loaded_already() -> None:
    done = run_python(PROGRAM, "torch-first")
    assert spin_counts(done.stderr) == [DEFAULT_SPINS]
    assert done.stdout == "None\n"


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(
    ("running", "threads", "policy"),
    [(1, "4", None), (1, "8", None), (2, "3", None), (2, "4", "PASSIVE"), (2, " 4,2", "PASSIVE"), (9, "1", "PASSIVE")],
)
def test_threads_sleep_only_if_other_programs_leave_too_few_cores(
    monkeypatch: pytest.MonkeyPatch, running: int, threads: str, policy: str | None
) -> None:
    monkeypatch.setattr(openmp, "running_threads", lambda: running)
    environment = {"OMP_NUM_THREADS": threads}
    openmp.choose_wait_policy(environment)
    assert environment.get("OMP_WAIT_POLICY") == policy


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(
    "setting", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "0"}], ids=str
)
def test_the_users_setting_wins(monkeypatch: pytest.MonkeyPatch, setting: dict[str, str]) -> None:
    monkeypatch.setattr(openmp, "running_threads", lambda: 9)
    environment = dict(setting)
    openmp.choose_wait_policy(environment)
    assert environment == setting


def test_torch_starts_a_thread_per_physical_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_SIBLINGS", str(tmp_path / "{}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 3, 5})
    for cpu, siblings in enumerate(["0,4", "1,5", "2,6", "3,7", "0,4", "1,5"]):
        (tmp_path / str(cpu)).write_text(f"{siblings}\n")
    assert openmp.num_threads({}) == 4
    assert openmp.num_threads({"OMP_NUM_THREADS": "3"}) == 3


def test_short_activity_of_other_programs_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    counts = iter([3, 1, 2])

    def next_sample(_seconds: float = 0) -> None:
        stat.write_text(f"cpu  1 2 3\nprocs_running {next(counts, 2)}\nprocs_blocked 5\n")

    next_sample()
    monkeypatch.setattr(openmp, "_STAT", stat)
    monkeypatch.setattr(time, "sleep", next_sample)
    assert openmp.running_threads() == 1
    for text in ("cpu 1 2 3\n", "procs_running x\n"):
        stat.write_text(text)
        assert openmp.running_threads() == 1
    stat.unlink()
    assert openmp.running_threads() == 1
