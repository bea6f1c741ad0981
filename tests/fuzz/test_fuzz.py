"""`make fuzz` reaches the code that a test calls, and reports a failure."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.conftest import cannot_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_fuzzer_tries_many_inputs_and_keeps_a_crash(tmp_path: Path) -> None:
    if find_spec("atheris") is None:
        cannot_run("needs atheris")
    target = "failing.test_fails_at_the_fiftieth_example"
    command = [sys.executable, "-m", "tests.fuzz.fuzz", target, "60"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    output = "\n".join(line for line in (done.stdout + done.stderr).splitlines() if "Instrumenting" not in line)
    assert done.returncode != 0
    assert "RuntimeError: failure on purpose" in output
    # More branches than these are covered only if tinyllama is instrumented.
    assert max(map(int, re.findall(r"cov: (\d+)", output))) > 30, output
    assert list((tmp_path / f"build/fuzz/{target}").glob("crash-*"))
