"""The table of runs tells what each is doing from its files and its lock alone, whatever has become of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import HOLD
from tests.terminal import on_a_terminal
from tests.train.launching import fault, launched

from tinyllama import cli
from tinyllama.files import exclusive_lock, is_locked
from tinyllama.recipe import Recipe
from tinyllama.runs.listing import RunState, find_runs, read_run_status, table

pytest_plugins = ["tests.train.fixtures"]
RECIPE = {"train": {"tokens": 400, "batch_sequences": 2, "sequence_length": 5}, "release": {"at_tokens": [200]}}


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "loss": 5 - step / 100, "tokens_per_second": 20.0, **more}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def make_run(folder: Path, steps: int = 10, events: tuple[str, ...] = ("start",), **recipe: Any) -> Path:
    """What a run of 40 steps leaves after so many, without weights."""
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | recipe))
    write_lines(folder / "metrics.jsonl", [row(step) for step in range(1, steps + 1)])
    named = [{"time": 0, "event": name, "step": steps, "problem": "no luck", "signal": "SIGTERM"} for name in events]
    write_lines(folder / "events.jsonl", named)
    return folder


def make_checkpoint(run: Path, step: int, milestone: bool = False, whole: bool = True) -> None:
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "milestone": milestone}))
    if whole:
        (folder / "commit.json").touch()


def make_release(run: Path, step: int, complete: bool) -> None:
    (run / "releases").mkdir(exist_ok=True)
    rows = [{"step": step, "complete": complete, "hellaswag": 31.5}]
    (run / "releases/releases.json").write_text(json.dumps({"releases": rows, "baselines": []}))


def said(one: RunState) -> tuple[str, str]:
    return one.state, one.note


# Real runs


@pytest.mark.slow
def test_a_run_is_running_until_it_is_killed_or_told_to_stop_and_done_at_its_end(small: Path, here: Path) -> None:
    recipe, run = Recipe.load(small / "recipe.yaml"), here / "runs/small"
    for step, number, note in ((13, signal.SIGTERM, "SIGTERM"), (24, signal.SIGKILL, "killed or cut off")):
        wait = fault(recipe, "wait", step, 3)
        (here / "go").unlink(missing_ok=True)
        with launched(small, here, faults=[wait]) as life:
            life.wait_until_struck(wait)
            running = read_run_status(run)
            assert (said(running), running.step, running.steps) == (("running", ""), step, 40)
            assert running.seconds_left is not None
            life.process.send_signal(number)
            life.go()
            life.end()
        assert said(read_run_status(run)) == ("stopped", note)
    with launched(small, here) as life:
        assert life.end() == 0, life.said()
    done = read_run_status(run)
    assert (said(done), done.step, done.tokens, done.seconds_left) == (("done", ""), 40, 40 * 6 * 64, None)
    assert (done.checkpoint_step, done.releases) == (40, 0)
    assert done.validation_bits_per_byte
    assert done.loss


def test_a_run_that_ends_by_an_error_has_failed_and_says_on_what(small: Path, here: Path) -> None:
    run = here / "runs/small"
    spikes = [fault(Recipe.load(small / "recipe.yaml"), "spike", step, 3) for step in range(24, 40)]
    flags = ("--guard.spike_window_steps", "8", "--guard.max_rollbacks", "1")
    with launched(small, here, *flags, faults=spikes) as life:
        assert life.end() == 1, life.said()
    failed = read_run_status(run)
    assert said(failed) == ("failed", "")
    assert "went back to step 20 1 times already" in failed.problem
    assert table(here / "runs")[-1] == f"small: {failed.problem}"


# The lock


def test_a_lock_is_seen_in_another_process_and_in_this_one_and_is_not_lost_by_looking(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    command = [sys.executable, "-c", HOLD, str(tmp_path), "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_locked(path)
        holder.communicate("")
    assert not is_locked(path)
    ask = [sys.executable, "-c", f"from tinyllama.files import *; print(is_locked(Path({str(path)!r})))"]
    with exclusive_lock(tmp_path, "lock", ""):
        assert is_locked(path)
        assert subprocess.run(ask, capture_output=True, text=True, check=True).stdout == "True\n"
    assert not is_locked(path)


# What is left of a run


@pytest.mark.parametrize(
    ("steps", "events", "expected"),
    [
        (10, ("start", "checkpoint"), ("stopped", "killed or cut off")),
        (10, ("start", "signal"), ("stopped", "SIGTERM")),
        (10, ("start", "interrupted"), ("stopped", "interrupted")),
        (10, ("start", "hang"), ("failed", "hung")),
        (10, ("start", "rank-lost"), ("failed", "lost a rank")),
        (10, ("start", "failed", "release"), ("failed", "")),
        (10, ("start", "failed", "resume"), ("stopped", "killed or cut off")),
        (40, ("start",), ("done", "")),  # of a version that had no event for it
        (0, (), ("stopped", "before it began")),
    ],
)
def test_the_last_event_of_its_life_says_how_it_ended(
    tmp_path: Path, steps: int, events: tuple[str, ...], expected: tuple[str, str]
) -> None:
    assert said(read_run_status(make_run(tmp_path / "run", steps, events))) == expected


def test_a_whole_run_says_how_many_of_its_milestones_wait_for_their_release(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 40, ("start",))
    make_checkpoint(run, 20, milestone=True)
    make_checkpoint(run, 40)
    assert said(read_run_status(run)) == ("done", "1 release waiting")
    make_release(run, 20, complete=False)
    assert said(read_run_status(run)) == ("done", "1 release waiting")
    write_lines(run / "events.jsonl", [{"event": "failed", "step": 40, "problem": "the release of step 20 failed"}])
    assert said(read_run_status(run)) == ("failed", "1 release waiting")
    make_release(run, 20, complete=True)
    found = read_run_status(run)
    assert said(found) == ("done", "")
    assert (found.releases, found.release_step, found.release_score) == (1, 20, 31.5)


def test_a_run_that_says_nothing_for_long_is_told_from_one_that_works(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    now = (run / "metrics.jsonl").stat().st_mtime
    with exclusive_lock(run, "lock", ""):
        assert said(read_run_status(run, now + 60)) == ("running", "")
        assert said(read_run_status(run, now + 600)) == ("running", "no row for 10 min")
        write_lines(run / "metrics.jsonl", [])
        assert said(read_run_status(run, now)) == ("running", "no row yet")


def test_the_numbers_are_of_the_last_rows_and_a_row_that_a_crash_cut_off_is_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    last = [row(11, validation_bits_per_byte=1.5), row(12, tokens_per_second=1.0), row(13) | {"loss": None}]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(one) + "\n" for one in last) + '{"step": 14, "tok')
    make_checkpoint(run, 5)
    make_checkpoint(run, 12)
    make_checkpoint(run, 13, whole=False)
    with exclusive_lock(run, "lock", ""):
        found = read_run_status(run)
    assert (found.step, found.tokens, found.loss) == (13, 130, 5 - 0.12)
    assert (found.validation_bits_per_byte, found.tokens_per_second) == (1.5, 20.0)
    assert found.seconds_left == (40 - 13) * 10 / 20
    assert found.checkpoint_step == 12


def test_a_run_of_another_version_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", train={"tokens": 400, "batch_sequences": 2, "sequence_length": 5, "sorcery": True})
    assert read_run_status(run).steps == 40
    unknown = read_run_status(make_run(tmp_path / "b", train={"horizon": 17}))
    assert (unknown.steps, unknown.step, unknown.state) == (None, 10, "stopped")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("recipe.yaml", lambda path: path.write_text("a: [1"), "not valid YAML; copy a checkpoint's"),
        ("recipe.yaml", lambda path: path.write_text("[1]"), "not a recipe"),
        ("metrics.jsonl", as_folder, "Is a directory"),
        ("events.jsonl", as_folder, "Is a directory"),
        ("recipe.yaml", lambda path: path.write_text("train: 3"), ""),
        ("metrics.jsonl", lambda path: path.write_bytes(b"\xff\xfe\n[1]\n7\n"), None),
    ],
)
def test_a_run_that_cannot_be_read_is_named_and_the_others_are_listed(
    tmp_path: Path, name: str, damage: Callable[[Path], object], problem: str | None
) -> None:
    make_run(tmp_path / "good")
    damage(make_run(tmp_path / "bad") / name)
    (tmp_path / "notes").mkdir()
    bad, good = map(read_run_status, find_runs(tmp_path))
    assert good.state == "stopped"
    assert bad.state == ("stopped" if problem is None else "unreadable")
    assert problem is None or problem in bad.problem
    assert [line.split()[0] for line in table(tmp_path)[1:3]] == ["bad", "good"]


def test_runs_are_found_in_folders_of_folders_and_not_inside_runs(tmp_path: Path) -> None:
    for name in ("one", "group/two", "group/three"):
        make_run(tmp_path / name)
    make_run(tmp_path / "one/checkpoints/step-1")
    make_run(tmp_path / ".hidden")
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert found == ["group/three", "group/two", "one"]
    assert find_runs(tmp_path / "one") == [tmp_path / "one"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bytes each reading took."""
    found: list[int] = []
    from tinyllama.runs import listing

    tail = listing._tail

    def counted(path: Path, size: int) -> bytes:
        data = tail(path, size)
        found.append(len(data))
        return data

    monkeypatch.setattr(listing, "_tail", counted)
    yield found


def test_of_a_run_of_a_million_rows_two_megabytes_are_read_at_most(tmp_path: Path, reads: list[int]) -> None:
    run = make_run(tmp_path / "run")
    line = json.dumps(row(7)).encode() + b"\n"
    with (run / "metrics.jsonl").open("wb") as file:
        for _ in range(100):
            file.write(line * 10_000)
        file.write(json.dumps(row(1_000_000)).encode() + b"\n")
    assert read_run_status(run).step == 1_000_000
    assert sum(reads) < 2 << 20


# The table


def test_without_a_terminal_every_column_is_there_and_can_be_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", 10, ("start", "failed"))
    make_checkpoint(make_run(tmp_path / "b/c", 40, ("start",)), 40)
    os.utime(tmp_path / "b/c/checkpoints/step-00000040/commit.json", (time.time() - 7300,) * 2)
    assert cli.main(["runs", str(tmp_path)]) == 0
    head, first, second, _, problem = capsys.readouterr().out.splitlines()
    columns = ["run", "state", "step", "tokens", "loss", "bits/byte", "tokens/s", "left", "last row", "checkpoint"]
    assert re.split(" {2,}", head) == [*columns, "releases"]
    assert first.split() == ["a", "failed", "10", "of", "40", "100", "4.900", "-", "20", "-", "-", "-", "-"]
    assert "40, 2 h ago" in second
    assert problem == "a: no luck"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_narrow_terminal_has_fewer_columns_and_no_broken_lines(tmp_path: Path, columns: int) -> None:
    run = make_run(tmp_path / "runs/a-run-with-a-name", 40, ("start",))
    make_checkpoint(run, 40)
    make_release(run, 40, complete=True)
    status, screen, _ = on_a_terminal([sys.executable, "-m", "tinyllama", "runs"], tmp_path, columns)
    assert status == 0
    head, line = screen
    assert line.startswith("a-run-with-a-name  done   40 of 40")
    assert ("loss" in head, "releases" in head) == (True, columns == 120)


def test_no_run_is_said_and_no_folder_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no run here; `tinyllama train` makes one\n"
    assert cli.main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "no folder here" in capsys.readouterr().err
