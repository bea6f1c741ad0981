"""Progress on a terminal, in a log and among ranks, and --quiet."""

import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from tests.terminal import run_on_terminal
from tests.train.launch import start_training

from tinyllama import cli, progress
from tinyllama.cli.arguments import pop_quiet_flag
from tinyllama.formatting import format_duration
from tinyllama.progress import BYTES, Bar, poll_progress

TINYLLAMA = (sys.executable, "-m", "tinyllama")

BAR_PROGRAM = [sys.executable, str(Path(__file__).with_name("bar_program.py"))]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


# Plain lines


def test_plain_line_has_count_rate_details_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Bar("training", 1000, "steps", rate="tokens", each=500, where="see runs/x", clock=clock) as bar:
        for step in range(1, 11):
            clock.now += 1
            bar.show(step, f"loss {step}.0")
    assert lines_of(capsys) == [
        "training: see runs/x",
        "training: 0 %, 5/1,000 steps, 500 tokens/s, loss 5.0, 16 min 35 s left",
    ]


def test_last_line_has_mean_rate_and_duration(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Bar("preparing", 40_000_000, BYTES, clock=clock) as bar:
        clock.now += 4
        bar.show(40_000_000)
        bar.show(40_000_000)
    assert lines_of(capsys) == ["preparing: 100 %, 40.0/40.0 MB, 10 MB/s, took 4 s"]


def test_line_intervals_grow(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    steps = []
    with Bar("training", 10**6, "steps", clock=clock) as bar:
        for step in range(1, 86_401):
            clock.now += 1
            bar.show(step)
            steps += [step] * len(lines_of(capsys))
    assert steps[:4] == [5, 20, 35, 50]
    assert 200 < len(steps) < 400
    assert max(later - earlier for earlier, later in pairwise(steps)) == 600


@pytest.mark.parametrize(
    ("steps", "start", "total", "expected"),
    [
        ([(range(1, 1001), 1), (range(1001, 1101), 3)], 0, 2100, "50 min left"),  # the recent rate
        ([([1], 60), (range(2, 32), 1)], 0, 131, "1 min 40 s left"),  # the first step compiles
        ([(range(901, 911), 1)], 900, 1000, "1 min 30 s left"),  # a resumed run
        ([(range(901, 1001), 1)], 900, 1000, "took 1 min 40 s"),
        ([(range(1, 31), 2), (range(21, 31), 2)], 0, 100, "2 min 20 s left"),  # a rollback
        ([(range(1, 31), 1), ([], 200)], 0, 100, "9 min 10 s left"),  # a step that stalls
    ],
)
def test_time_left_follows_the_recent_rate(
    steps: list[tuple[Sequence[int], float]], start: int, total: int, expected: str
) -> None:
    clock = Clock()
    bar = Bar("x", total, "steps", start, clock=clock)
    for group, seconds in steps:
        for step in group:
            clock.now += seconds
            bar.show(step)
        clock.now += 0 if group else seconds
    assert bar._time(clock.now) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "under 1 s"),
        (12.4, "12 s"),
        (59.7, "1 min"),
        (250, "4 min 10 s"),
        (3600, "1 h"),
        (2 * 86_400 + 3 * 3600 + 59, "2 d 3 h"),
    ],
)
def test_duration_has_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# A terminal


def test_bar_fits_60_columns_below_other_output(tmp_path: Path) -> None:
    status, screen, _ = run_on_terminal(BAR_PROGRAM, tmp_path, 60)
    assert status == 0
    assert "".join(screen[:2]).endswith(": `tinyllama watch runs/long` shows it")
    *above, top, numbers, last = screen[2:]
    assert above == ["the tracker failed", "WARNING:root:a library", "a result"]
    assert re.fullmatch(r"training a-name-of-forty-char\w*… ━+ 100 % took .* s", top)
    assert re.fullmatch(r"  300/300 steps, [\d,]+ tokens/s, loss 3.142", numbers)
    assert last == "run: runs/long"


def test_bar_respects_no_color_and_dumb_terminal(tmp_path: Path) -> None:
    _, _, plain = run_on_terminal(BAR_PROGRAM, tmp_path, 100, NO_COLOR="1")
    assert not re.search(rb"\x1b\[[\d;]*3[0-9][;m]", plain)
    _, screen, dumb = run_on_terminal(BAR_PROGRAM, tmp_path, 100, TERM="dumb")
    assert b"\x1b" not in dumb
    assert any(line.startswith("training a-name") and "100 %, 300/300 steps" in line for line in screen)


def test_redirected_output_is_kept_out_of_bar(tmp_path: Path) -> None:
    run_on_terminal(["sh", "-c", '"$0" "$@" > out', *BAR_PROGRAM], tmp_path, 80)
    assert (tmp_path / "out").read_text() == "a result\nrun: runs/long\n"


# The commands


def tinyllama(folder: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [*TINYLLAMA, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_work_is_complete_only_when_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    counted = threading.Semaphore(0)
    with poll_progress("writing", 4, "files", lambda: counted.release() or 4) as begin:  # type: ignore[func-returns-value]
        begin()
        for _ in range(3):  # the third count begins after the first one was shown
            counted.acquire()
        assert not lines_of(capsys)
    assert [line.partition(",")[0] for line in lines_of(capsys)] == ["writing: 100 %"]


def test_prepare_logs_rate_and_location(small: Path, tmp_path: Path) -> None:
    done = tinyllama(tmp_path, "prepare", small / "recipe.yaml", "--data.store", "store")
    size = sum(path.stat().st_size for path in (small / "raw").rglob("*.jsonl")) / 1e6
    first, last, following = done.stderr.splitlines()
    assert first == "preparing: 2 tasks, 0 of them already finished; the store is store"
    assert re.fullmatch(rf"preparing: 100 %, {size:.1f}/{size:.1f} MB, [\d.]+ MB/s, took .* s", last)
    assert following == f"next: tinyllama train {small / 'recipe.yaml'} --data.store store"


def test_quiet_keeps_results_and_errors(small: Path, tmp_path: Path) -> None:
    done = tinyllama(tmp_path, "prepare", "--quiet", small / "recipe.yaml", "--data.store", "store")
    assert (done.returncode, done.stderr) == (0, "")
    assert "store/modules/train: " in done.stdout
    done = tinyllama(tmp_path, "--quiet", "train", small / "recipe.yaml", "--data.store", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("tinyllama: nowhere: ")


def test_quiet_after_double_dash_is_an_argument(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pop_quiet_flag(["generate", "m", "--", "--quiet"]) == (["generate", "m", "--", "--quiet"], False)
    assert pop_quiet_flag(["generate", "m", "--quiet", "x"]) == (["generate", "m", "x"], True)
    cli.main(["--quiet", "help"])
    assert progress.is_quiet()
    cli.main(["help"])
    assert not progress.is_quiet()
    assert "--quiet" in capsys.readouterr().out


@pytest.mark.slow
def test_only_rank_0_shows_progress(small: Path, tmp_path: Path) -> None:
    short = ("--train.tokens", str(3 * 6 * 64))
    with start_training(small, tmp_path / "shown", *short, ranks=2) as life:
        assert life.end() == 0, life.output()
        lines = [line for line in life.output().splitlines() if line.startswith("training small: ")]
    size, where, end = lines
    assert size.startswith("training small: 150,848 parameters, 3 steps of 384 tokens, 2 ranks")
    assert where == "training small: `tinyllama watch runs/small` shows it"
    assert re.fullmatch(r"training small: 100 %, 3/3 steps, [\d.,]+ tokens/s, loss [\d.]+, took .* s", end)
    with start_training(small, tmp_path / "quiet", *short, "--quiet", ranks=2) as life:
        assert life.end() == 0, life.output()
        assert "training small" not in life.output()
        assert "run: runs/small" in life.output()
