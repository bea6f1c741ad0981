"""Engines in child processes: llama.cpp without weight repacking, and reports of crashes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from tests.fork_server import started_normally
from tests.release.native import compute_batches, run_in_child

from tinyllama import cli
from tinyllama.release import engines
from tinyllama.release.verify import verify_release

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CRASHED = "llama.cpp crashed (SIGSEGV) on this machine"


def plant_crash(monkeypatch: pytest.MonkeyPatch, engine: str, how: str) -> None:
    """End the engine's process by a signal number or by `error`; other engines run."""
    monkeypatch.setenv("ENGINES", engines.__file__)
    monkeypatch.setattr(engines, "__file__", str(HERE / "crashing_engine.py"))
    monkeypatch.setenv("CRASH", f"{engine}={how}")


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
def test_llama_cpp_does_not_repack_weights(all_formats: Path, kind: str) -> None:
    command = [sys.executable, str(HERE / "llama_cpp_buffers.py"), str(all_formats / f"gguf/small-{kind}.gguf")]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "extra buffers: False" in log
    assert "REPACK model buffer" not in log
    assert "AMX model buffer" not in log


def test_quantised_file_runs_at_all_batch_lengths(all_formats: Path) -> None:
    """Without the wrapper this crashes on CPUs with AMX."""
    run_in_child(compute_batches, all_formats / "gguf/small-Q4_K_M.gguf", (1, 2, 3, 17, 64))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGILL, signal.SIGABRT])
def test_crashed_engine_fails_its_checks_and_the_others_run(
    release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    plant_crash(monkeypatch, "llama_cpp", str(int(number)))
    with started_normally() if number is signal.SIGSEGV else nullcontext():
        checks = verify_release(release)
    crashed = [check for check in checks if not check.passed]
    assert [check.subject for check in crashed] == ["gguf F16", "gguf Q8_0", "gguf Q4_K_M"]
    assert {check.found for check in crashed} == {
        f"llama.cpp crashed ({number.name}) on this machine: a line that the engine logged"
    }
    assert {check.subject for check in checks if check.passed} >= {"huggingface", "ctranslate2 int8"}


def test_crash_is_reported_once_with_its_remedy(
    release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_crash(monkeypatch, "any", str(int(signal.SIGSEGV)))
    assert cli.main(["verify", str(release)]) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith(CRASHED))
    assert "does not show that the file is invalid" in line
    assert "CMAKE_ARGS=-DGGML_NATIVE=OFF" in line
    assert lines[-1] == "6 of 7 checks failed"


def test_killed_engine_is_not_reported_as_a_crash(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_crash(monkeypatch, "ctranslate2", str(int(signal.SIGKILL)))
    failed = [check for check in verify_release(release) if not check.passed]
    assert {check.found.split(":")[0] for check in failed} == {"CTranslate2 was killed (SIGKILL)"}
    assert all("memory" in check.remedy for check in failed)


def test_crash_in_the_smoke_test_keeps_the_release_with_status_1(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_crash(monkeypatch, "llama_cpp", str(int(signal.SIGSEGV)))
    with started_normally():
        assert cli.main(["release", str(run), "--formats", "huggingface", "gguf"]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "tinyllama:" in line)
    assert CRASHED in line
    assert "released" in line
    assert (run / "releases/step-00000040/release.json").is_file()


@pytest.mark.parametrize(
    ("engine", "how", "keyword"),
    [
        ("llama_cpp", "error", "llama.cpp"),
        ("quantise", "error", "--formats"),
        ("quantise", str(int(signal.SIGILL)), "crashed (SIGILL)"),
        ("convert", str(int(signal.SIGILL)), "crashed (SIGILL)"),
    ],
)
def test_engine_that_fails_or_crashes_during_conversion_leaves_no_release(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: str, how: str, keyword: str
) -> None:
    plant_crash(monkeypatch, engine, how)
    assert cli.main(["release", str(run), "--formats", "gguf", "ctranslate2"]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "tinyllama:" in line)
    assert keyword in line
    assert not any((run / "releases").glob("*/release.json"))


def test_engine_ends_with_its_parent() -> None:
    stdin, kept_open = os.pipe()
    command = [sys.executable, str(HERE / "engine_starter.py"), engines.__file__]
    with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        engine = Path("/proc", starter.stdout.readline().strip(), "stat")
        for _ in range(10):  # asleep for half a second, waiting for its input
            wait_for(lambda: ") S " in engine.read_text())
            time.sleep(0.05)
        starter.kill()
    wait_for(lambda: not engine.exists())
    os.close(kept_open)
    os.close(stdin)


def wait_for(condition: Callable[[], bool]) -> None:
    """Return once the condition holds; the test's timeout ends an endless wait."""
    while not condition():
        time.sleep(0.05)
