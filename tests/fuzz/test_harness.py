"""`make fuzz` reaches what a target is for and says when one breaks: its command is run on a copy of the tests.

There one more target does what a real one does fifty times, and then raises. One run shows both, since a run's start,
at which every module of tinyllama is instrumented, takes most of its seconds.
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
BROKEN_AT_50 = """

_real, _tried = TARGETS["jsonl.jsonl"], []


def _broken(data: bytes) -> None:
    _real.check(data)
    _tried.append(data)
    if len(_tried) == 50:
        raise RuntimeError("broken on purpose")


TARGETS["broken"] = Target(_broken, _real.seeds)
"""


def copy_with_a_broken_target(folder: Path) -> None:
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "artefacts"))
    with (folder / "tests/fuzz/targets.py").open("a") as file:
        file.write(BROKEN_AT_50)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_a_target_is_tried_with_many_inputs_until_it_raises_which_ends_it_and_keeps_the_input(tmp_path: Path) -> None:
    copy_with_a_broken_target(tmp_path)
    command = [sys.executable, "-m", "tests.fuzz.fuzz", "broken", "60"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    said = "\n".join(line for line in (done.stdout + done.stderr).splitlines() if "Instrumenting" not in line)
    assert done.returncode != 0
    assert "RuntimeError: broken on purpose" in said  # and not an error of the real target's
    assert max(map(int, re.findall(r"cov: (\d+)", said))) > 30, said  # only where tinyllama's branches are seen
    assert list((tmp_path / "build/fuzz/broken").glob("crash-*"))
    assert list((tmp_path / "build/fuzz/broken/corpus").iterdir())
