"""A wall clock that goes back changes nothing but the times that are written down."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import contents
from tests.faults.commands import run_command
from tests.faults.conftest import EVALUATE, RELEASE, RUN, skip_peak, write_recipe
from tests.faults.soak_checks import compare_checkpoints, files_without_times, metrics_without_speed
from tests.tracking.test_trackio_sink import TrackioData
from tests.train.launch import read_events, read_metrics

from tinyllama.files import read_json
from tinyllama.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

WAY = f"""
import sys, time
from tinyllama import hardware
from tinyllama.cli import main
hardware.peak_flops = lambda device, precision: None
before = time.time()
for words in (
    "tokenizer train recipe.yaml --vocab-size 600", "prepare recipe.yaml", "inspect store --verify",
    "train recipe.yaml --track.trackio true", "release {RUN} --formats huggingface",
    "{" ".join(map(str, EVALUATE))}", "report {RUN}", "generate {RUN} import", "runs",
):
    assert main([*words.split(), "--quiet"]) == 0, words
assert time.time() < before - 1000, "it goes forward"
"""


@pytest.fixture(scope="module")
def backwards(gone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The whole way, gone while the clock ran backwards, and what was said on it."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler for a clock that runs backwards")
    folder = tmp_path_factory.mktemp("backwards")
    clock = folder / "clock.so"
    source = Path(__file__).with_name("backwards.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", clock, source], check=True)
    way = folder / "way"
    shutil.copytree(gone / "raw", way / "raw")
    write_recipe(way)
    environment = os.environ | {"LD_PRELOAD": str(clock), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WAY], cwd=way, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return way, done.stdout


def test_a_clock_that_runs_backwards_changes_no_byte_but_times(backwards: tuple[Path, str], gone: Path) -> None:
    way, _ = backwards
    for name in ("tokenizer", "store"):
        assert contents(way / name) == contents(gone / name)
    assert metrics_without_speed(way / RUN) == metrics_without_speed(gone / RUN)
    compare_checkpoints(way / RUN, gone / RUN, 12)
    facts, wanted = (read_json(folder / RELEASE / "release.json") for folder in (way, gone))
    ours, theirs = files_without_times(way / RELEASE, facts), files_without_times(gone / RELEASE, wanted)
    scores = [read_json(folder / RELEASE / "evaluation.json") for folder in (way, gone)]
    assert scores[0]["rows"] == scores[1]["rows"]
    assert {name for name in ours if ours[name] != theirs[name]} == {"evaluation.json"}  # which says how long it took


def test_a_clock_that_runs_backwards_makes_no_speed_age_or_time_left_negative(backwards: tuple[Path, str]) -> None:
    way, said = backwards
    table = said[said.index("RUN") if "RUN" in said else 0 :]
    assert not re.search(r"(?<![\w-])-\d", table), table
    report = (way / RUN / "report.html").read_text()
    assert not re.search(r">\s*-\d[\d.]* (s|min|h|d)\b", report)
    assert "wall clock" in report
    assert all(row["tokens_per_second"] > 0 for row in read_metrics(way / RUN))
    shown = TrackioData(way / RUN.parent).logs["small"]
    assert [row["step"] for row in shown if "loss" in row] == list(range(1, 13))
    times = [row["timestamp"] for row in shown if "loss" in row]
    assert times == sorted(times)


def test_the_newest_checkpoint_is_that_of_the_highest_step_whatever_its_files_times_say(way: Path) -> None:
    checkpoints = RunDir(way / RUN).checkpoints()
    assert len(checkpoints) > 1
    for age, checkpoint in enumerate(reversed(checkpoints)):
        for path in checkpoint.path.rglob("*"):
            os.utime(path, (age * 1e6, age * 1e6))
    assert RunDir(way / RUN).find_checkpoint().step == 12
    more = ("--train.tokens", str(14 * 6 * 64), "--allow-change")
    ended = run_command(way, "train", "recipe.yaml", *more, fault=skip_peak)
    assert ended.status == 0, ended.said
    assert [event["step"] for event in read_events(way / RUN, "resume")] == [12]
