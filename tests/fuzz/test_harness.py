"""`make fuzz` reaches the code of a target and reports a failure; its command runs on a copy of the tests.

The copy has one more target, which behaves like a real one for fifty inputs and then raises. One run tests both, since
instrumenting every module of tinyllama takes most of the time.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FAILING_TARGET = """

_real, _tried = TARGETS["jsonl.jsonl"], []


def _fail(data: bytes) -> None:
    _real.check(data)
    _tried.append(data)
    if len(_tried) == 50:
        raise RuntimeError("failure on purpose")


TARGETS["failing"] = Target(_fail, _real.seeds)
"""


def copy_with_failing_target(folder: Path) -> None:
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "artefacts"))
    with (folder / "tests/fuzz/targets.py").open("a") as file:
        file.write(FAILING_TARGET)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_fuzzer_tries_many_inputs_and_keeps_a_crash(tmp_path: Path) -> None:
    copy_with_failing_target(tmp_path)
    command = [sys.executable, "-m", "tests.fuzz.fuzz", "failing", "60"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    output = "\n".join(line for line in (done.stdout + done.stderr).splitlines() if "Instrumenting" not in line)
    assert done.returncode != 0
    assert "RuntimeError: failure on purpose" in output  # not an error of the real target
    assert max(map(int, re.findall(r"cov: (\d+)", output))) > 30, (
        output
    )  # only if tinyllama's branches are instrumented
    assert list((tmp_path / "build/fuzz/failing").glob("crash-*"))
    assert list((tmp_path / "build/fuzz/failing/corpus").iterdir())
