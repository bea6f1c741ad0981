"""The table of runs, from their files and locks."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.json_keys import read_documented_json
from tests.conftest import locked_by_another_process
from tests.release.native import run_in_child
from tests.terminal import run_on_terminal
from tests.train.launch import fault_in_batch, start_training

from tinyllama import cli
from tinyllama.files import exclusive_lock, is_locked, write_json
from tinyllama.recipe import Recipe
from tinyllama.runs.listing import find_runs, list_runs, read_run_status
from tinyllama.runs.run_dir import RunDir

RECIPE = {"train": {"tokens": 400, "batch_sequences": 2, "sequence_length": 5}, "release": {"at_tokens": [200]}}


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "loss": 5 - step / 100, "tokens_per_second": 20.0, **more}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def make_run(folder: Path, steps: int = 10, events: tuple[str, ...] = ("start",), **recipe: Any) -> RunDir:
    """Write the files that a run of 40 steps has after `steps` steps, without weights."""
    run = RunDir(folder)
    folder.mkdir(parents=True)
    run.lock_path.touch()
    run.recipe_path.write_text(yaml.safe_dump(RECIPE | recipe))
    write_lines(run.metrics_path, [row(step) for step in range(1, steps + 1)])
    named = [{"time": 0, "event": name, "step": steps, "problem": "no luck", "signal": "SIGTERM"} for name in events]
    write_lines(run.events_path, named)
    return run


def make_checkpoint(run: RunDir, step: int, milestone: bool = False, committed: bool = True) -> None:
    checkpoint = run.checkpoint(step)
    write_json(checkpoint.state_path, {"step": step, "milestone": milestone})
    if committed:
        checkpoint.commit_path.touch()


def make_release(run: RunDir, step: int, complete: bool) -> None:
    commit = run.checkpoint(step).commit_hash
    rows = [{"step": step, "complete": complete, "hellaswag": 31.5, "commit": commit}]
    write_json(run.releases.table_path, {"releases": rows, "baselines": []})


def state_and_note(run: RunDir, now: float | None = None) -> tuple[str, str]:
    status = read_run_status(run, now)
    return status.state, status.note


# Real runs


@pytest.mark.slow
def test_state_of_a_real_run_that_is_signalled_killed_and_finished(small: Path, tmp_path: Path) -> None:
    recipe, run = Recipe.load(small / "recipe.yaml"), RunDir(tmp_path / "runs/small")
    for step, number, note in ((13, signal.SIGTERM, "SIGTERM"), (24, signal.SIGKILL, "killed")):
        wait = fault_in_batch(recipe, "wait", step, 3)
        (tmp_path / "go").unlink(missing_ok=True)
        with start_training(small, tmp_path, faults=[wait]) as life:
            life.wait_until_injected(wait)
            running = read_run_status(run)
            assert (running.state, running.note, running.step, running.steps) == ("running", "", step, 40)
            assert running.seconds_left is not None
            life.send_signal(number)
            life.resume_waiting()
            life.end()
        assert state_and_note(run) == ("stopped", note)
    with start_training(small, tmp_path) as life:
        assert life.end() == 0, life.output()
    done = read_run_status(run)
    assert (done.state, done.step, done.tokens, done.seconds_left) == ("done", 40, 40 * 6 * 64, None)
    assert (done.checkpoint_step, done.releases) == (40, 0)
    assert done.validation_bits_per_byte
    assert done.loss


# Locks


def test_a_lock_is_visible_to_all_processes_and_survives_the_check(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    with locked_by_another_process(tmp_path):
        assert is_locked(path)
    assert not is_locked(path)
    with exclusive_lock(path, ""):
        assert is_locked(path)
        assert run_in_child(is_locked, path)
    assert not is_locked(path)


# States


@pytest.mark.parametrize(
    ("steps", "events", "expected"),
    [
        (10, ("start", "checkpoint"), ("stopped", "killed")),
        (10, ("start", "signal"), ("stopped", "SIGTERM")),
        (10, ("start", "interrupted"), ("stopped", "interrupted")),
        (10, ("start", "hang"), ("failed", "hung")),
        (10, ("start", "rank-lost"), ("failed", "lost a rank")),
        (10, ("start", "failed", "release"), ("failed", "")),
        (10, ("start", "failed", "resume"), ("stopped", "killed")),
        (10, ("start", "unknown"), ("stopped", "killed")),
        (40, ("start",), ("done", "")),  # killed after its last step
        (0, (), ("stopped", "before its first step")),
    ],
)
def test_state_follows_from_the_last_lifecycle_event(
    tmp_path: Path, steps: int, events: tuple[str, ...], expected: tuple[str, str]
) -> None:
    assert state_and_note(make_run(tmp_path / "run", steps, events)) == expected


def test_a_trained_run_counts_its_pending_releases(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 40, ("start",))
    make_checkpoint(run, 20, milestone=True)
    make_checkpoint(run, 40)
    assert state_and_note(run) == ("done", "1 release pending")
    make_release(run, 20, complete=False)
    write_lines(run.events_path, [{"event": "failed", "step": 40, "problem": "the release of step 20 failed"}])
    assert state_and_note(run) == ("failed", "1 release pending")
    make_release(run, 20, complete=True)
    found = read_run_status(run)
    assert (found.state, found.note) == ("done", "")
    assert (found.releases, found.release_step, found.release_score) == (1, 20, 31.5)


def test_a_stalled_run_is_distinguished_from_a_working_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    now = run.metrics_path.stat().st_mtime
    with exclusive_lock(run.lock_path, ""):
        assert state_and_note(run, now + 60) == ("running", "")
        assert state_and_note(run, now + 600) == ("running", "no row for 10 min")
        write_lines(run.metrics_path, [])
        assert state_and_note(run, now) == ("running", "no row yet")


def test_figures_come_from_the_newest_complete_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    by_source = {"validation_bits_per_byte/a-1": 1.25, "validation_bits_per_byte/b": 2.0}
    last = [
        row(11, validation_bits_per_byte=1.5, **by_source),
        row(12, tokens_per_second=1.0),
        row(13) | {"loss": None},
    ]
    with run.metrics_path.open("a") as file:
        file.write("".join(json.dumps(one) + "\n" for one in last) + '{"step": 14, "tok')
    make_checkpoint(run, 5)
    make_checkpoint(run, 12)
    make_checkpoint(run, 13, committed=False)
    with exclusive_lock(run.lock_path, ""):
        found = read_run_status(run)
    assert (found.step, found.tokens, found.loss) == (13, 130, 5 - 0.12)
    assert (found.validation_bits_per_byte, found.tokens_per_second) == (1.5, 20.0)
    assert found.validation_bits_per_byte_by_source == {"a-1": 1.25, "b": 2.0}
    assert found.seconds_left == (40 - 13) * 10 / 20
    assert found.checkpoint_step == 12


def test_a_run_of_another_version_is_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", train={"tokens": 400, "batch_sequences": 2, "sequence_length": 5, "sorcery": True})
    assert read_run_status(run).steps == 40
    unknown = read_run_status(make_run(tmp_path / "b", train={"horizon": 17}))
    assert (unknown.steps, unknown.step, unknown.state) == (None, 10, "stopped")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("recipe.yaml", lambda path: path.write_text("a: [1"), ": not valid YAML"),
        ("recipe.yaml", lambda path: path.write_text("[1]"), "not a recipe"),
        ("metrics.jsonl", replace_by_folder, "Is a directory"),
        ("events.jsonl", replace_by_folder, "Is a directory"),
        ("recipe.yaml", lambda path: path.write_text("train: 3"), ""),
        ("metrics.jsonl", lambda path: path.write_bytes(b"\xff\xfe\n[1]\n7\n"), None),
    ],
)
def test_a_damaged_run_is_unreadable_and_the_others_are_listed(
    tmp_path: Path, name: str, damage: Callable[[Path], object], problem: str | None
) -> None:
    make_run(tmp_path / "good")
    damage(make_run(tmp_path / "bad").path / name)
    (tmp_path / "notes").mkdir()
    bad, good = map(read_run_status, find_runs(tmp_path))
    assert good.state == "stopped"
    assert bad.state == ("stopped" if problem is None else "unreadable")
    assert problem is None or problem in bad.problem
    assert [line.split()[0] for line in list_runs(tmp_path)[1:3]] == ["bad", "good"]


def test_runs_are_found_in_nested_folders_but_not_in_runs(tmp_path: Path) -> None:
    for name in ("one", "group/two", "group/three", "one/checkpoints/step-1", ".hidden"):
        make_run(tmp_path / name)
    found = [run.path.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)]
    assert found == ["group/three", "group/two", "one"]
    assert find_runs(tmp_path / "one") == [RunDir(tmp_path / "one")]


# The table


def test_without_a_terminal_the_table_has_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", 10, ("start", "failed"))
    run = make_run(tmp_path / "b/c", 40, ("start",))
    make_checkpoint(run, 40)
    os.utime(run.checkpoint(40).commit_path, (time.time() - 7300,) * 2)
    assert cli.main(["runs", str(tmp_path)]) == 0
    head, first, second, _, problem = capsys.readouterr().out.splitlines()
    columns = ["run", "state", "step", "tokens", "loss", "bits/byte", "tokens/s", "left", "last row", "checkpoint"]
    assert re.split(" {2,}", head) == [*columns, "releases"]
    assert first.split() == ["a", "failed", "10", "of", "40", "100", "4.900", "-", "20", "-", "-", "-", "-"]
    assert "40, 2 h ago" in second
    assert problem == "a: no luck"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_narrow_terminal_has_fewer_columns_and_no_wrapped_lines(tmp_path: Path, columns: int) -> None:
    run = make_run(tmp_path / "runs/a-run-with-a-name", 40, ("start",))
    make_checkpoint(run, 40)
    make_release(run, 40, complete=True)
    status, screen, _ = run_on_terminal([sys.executable, "-m", "tinyllama", "runs"], tmp_path, columns)
    assert status == 0
    head, line, *note = screen
    assert line.startswith("a-run-with-a-name  done   40 of 40")
    assert ("loss" in head, "releases" in head) == (True, columns == 120)
    hidden = [name for name in ("tokens", "tokens/s", "checkpoint", "releases") if name not in re.split(" {2,}", head)]
    if hidden:
        assert (
            " ".join(note) == f"not shown at {columns} columns: {', '.join(hidden)}; widen the terminal, or use --json"
        )
    else:
        assert not note


def test_json_has_the_documented_keys_and_no_infinite_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", 10, ("start", "failed"))
    write_lines(make_run(tmp_path / "b").metrics_path, [row(1) | {"loss": float("inf")}])
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    failed, infinite = read_documented_json("runs", capsys.readouterr().out)["runs"]
    assert (failed["run"], failed["state"], failed["problem"]) == (str(tmp_path / "a"), "failed", "no luck")
    assert infinite["loss"] is None
    (tmp_path / "none").mkdir()
    assert cli.main(["runs", str(tmp_path / "none"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == []


def test_a_folder_without_runs_and_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "no run here" in capsys.readouterr().out
    assert cli.main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "no folder here" in capsys.readouterr().err
