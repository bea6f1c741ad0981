"""A wall clock that runs backwards changes only the times that are written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import cannot_run, contents
from tests.faults.commands import assert_succeeds
from tests.faults.conftest import RELEASE, RUN, skip_peak, write_recipe
from tests.faults.soak_checks import compare_checkpoints, files_without_times, metrics_without_speed
from tests.tracking.test_trackers import read_tensorboard_log
from tests.train.launch import event_steps, read_metrics

from tinyllama.files import read_json
from tinyllama.runs.run_dir import RunDir

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backwards(completed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a pipeline that ran while the clock ran backwards, and its output."""
    if shutil.which("cc") is None:
        cannot_run("needs a C compiler for a clock that runs backwards")
    folder = tmp_path_factory.mktemp("backwards")
    clock = folder / "clock.so"
    source = Path(__file__).with_name("backwards.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", clock, source], check=True)
    pipeline = folder / "pipeline"
    shutil.copytree(completed / "raw", pipeline / "raw")
    write_recipe(pipeline)
    environment = os.environ | {
        "LD_PRELOAD": str(clock),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("pipeline_program.py")],
        cwd=pipeline,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return pipeline, done.stdout


def test_clock_that_runs_backwards_changes_only_times(backwards: tuple[Path, str], completed: Path) -> None:
    pipeline, _ = backwards
    for name in ("tokenizer", "store"):
        assert contents(pipeline / name) == contents(completed / name)
    assert metrics_without_speed(pipeline / RUN) == metrics_without_speed(completed / RUN)
    compare_checkpoints(pipeline / RUN, completed / RUN, 12)
    metadata = [read_json(folder / RELEASE / "release.json") for folder in (pipeline, completed)]
    files, expected = (
        files_without_times(folder / RELEASE, own) for folder, own in zip((pipeline, completed), metadata, strict=True)
    )
    scores = [read_json(folder / RELEASE / "evaluation.json") for folder in (pipeline, completed)]
    assert scores[0]["rows"] == scores[1]["rows"]
    assert {name for name in files if files[name] != expected[name]} == {"evaluation.json"}  # contains its duration


def test_clock_that_runs_backwards_makes_no_speed_or_duration_negative(backwards: tuple[Path, str]) -> None:
    pipeline, output = backwards
    table = output[output.index("RUN") if "RUN" in output else 0 :]
    assert not re.search(r"(?<![\w-])-\d", table), table
    report = (pipeline / RUN / "report.html").read_text()
    assert not re.search(r">\s*-\d[\d.]* (s|min|h|d)\b", report)
    assert "wall clock" in report
    assert all(row["tokens_per_second"] > 0 for row in read_metrics(pipeline / RUN))
    shown = read_tensorboard_log(RunDir(pipeline / RUN)).Scalars("loss")
    assert [event.step for event in shown] == list(range(1, 13))
    times = [event.wall_time for event in shown]
    assert times == sorted(times)


def test_newest_checkpoint_has_the_highest_step_whatever_its_file_times(pipeline: Path) -> None:
    checkpoints = RunDir(pipeline / RUN).checkpoints()
    assert len(checkpoints) > 1
    for age, checkpoint in enumerate(reversed(checkpoints)):
        for path in checkpoint.path.rglob("*"):
            os.utime(path, (age * 1e6, age * 1e6))
    assert RunDir(pipeline / RUN).find_checkpoint().step == 12
    longer = ("--train.tokens", str(14 * 6 * 64), "--allow-change")
    assert_succeeds(pipeline, "train", "recipe.yaml", *longer, fault=skip_peak)
    assert event_steps(pipeline / RUN, "resume") == [12]
