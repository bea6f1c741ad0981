"""What trackio has of a run, read from its storage by processes, since each can open one folder only."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.tracking.run_files import BATCH_TOKENS, evaluation, new_run, write_release, write_resume, write_steps

from tinyllama.files import write_json
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.trackers import try_acquire_sink
from tinyllama.tracking.trackio_sink import MAX_ALERTS, MAX_ANNOTATIONS

ENTRIES = ("small", "small/mark/releases", "small/mark/trouble")


class TrackioData:
    """What trackio has of the runs of a folder after they were fed to it."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("trackio_process.py")), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.stderr = done.stderr
        data = json.loads(done.stdout)
        self.ids: list[str] = data["ids"]
        self.names, self.logs, self.alerts, self.groups = (data[key] for key in ("names", "logs", "alerts", "groups"))

    def values(self, run: str, metric: str = "loss") -> list[tuple[int, float]]:
        return [(row["step"], row[metric]) for row in self.logs[run] if metric in row]

    def vertical_lines(self, kind: str, run: str = "small") -> list[tuple[int, float, float]]:
        """Return the step, lowest and highest point of each line; between two lines is a value that is not a number."""
        losses = [(row["step"], row["loss"]) for row in self.logs[f"{run}/mark/{kind}"] if "loss" in row]
        assert all(isinstance(gap, dict) for _, gap in losses[2::3])
        assert len({low[0] == high[0] for low, high in zip(losses[::3], losses[1::3], strict=True)} - {True}) == 0
        return [(low[0], low[1], high[1]) for low, high in zip(losses[::3], losses[1::3], strict=True)]


def test_each_row_is_logged_once_with_its_tokens(run: RunDir, log: RunLog) -> None:
    write_steps(log, 1, 3)
    TrackioData(run.path.parent)
    write_steps(log, 4, 4, validation_loss=2.0)
    shown = TrackioData(run.path.parent)
    assert [number for number, _ in shown.values("small")] == [1, 2, 3, 4]
    assert shown.values("small", "tokens") == [(number, number * BATCH_TOKENS) for number in (1, 2, 3, 4)]
    assert shown.values("small", "memory_gigabytes")[0] == (1, 1.0)
    assert shown.values("small", "validation_loss") == [(4, 2.0)]


def test_rows_and_alerts_repeated_after_a_kill_are_there_once(run: RunDir, log: RunLog) -> None:
    write_steps(log, 1, 3)
    TrackioData(run.path.parent)
    before = (run.path / "trackers/trackio.json").read_bytes()
    write_steps(log, 4, 6)
    log.event("failed", 6, problem="none")
    TrackioData(run.path.parent)
    (run.path / "trackers/trackio.json").write_bytes(before)
    shown = TrackioData(run.path.parent)
    assert [number for number, _ in shown.values("small")] == [1, 2, 3, 4, 5, 6]
    assert len(shown.alerts) == 1


def test_rolled_back_steps_are_replaced(run: RunDir, log: RunLog) -> None:
    write_steps(log, 1, 25)
    TrackioData(run.path.parent)
    log.event("rollback", 26, reason="spike", checkpoint=20, skipped_batches=[24, 25])
    write_resume(log, 20)
    write_steps(log, 21, 24, change=0.5)
    shown = TrackioData(run.path.parent)
    assert shown.values("small")[19:] == [(20, 1 + 8 / 20), *((at, 1 + 8 / at + 0.5) for at in (21, 22, 23, 24))]
    assert [at for at, *_ in shown.vertical_lines("trouble")] == [26]


def test_another_run_of_the_same_name_replaces_the_first(tmp_path: Path) -> None:
    run, log = new_run(tmp_path / "first")
    write_steps(log, 1, 9)
    log.event("signal", 9, signal="SIGTERM")
    write_release(run, 9, 30.0, [{"name": "Big", "hellaswag": 60.0, "source": "published, a card"}])
    TrackioData(run.path.parent)
    other, log = new_run(tmp_path / "second")
    write_steps(log, 1, 2)
    (run.path.parent / ".trackio").rename(other.path.parent / ".trackio")
    shown = TrackioData(other.path.parent)
    assert ({*shown.ids}, [at for at, _ in shown.values("small")], len(shown.alerts)) == ({*ENTRIES}, [1, 2], 0)
    assert shown.vertical_lines("trouble") == []


def test_releases_and_problems_are_vertical_lines_and_problems_are_alerts(run: RunDir, log: RunLog) -> None:
    write_steps(log, 1, 20)
    log.event("checkpoint", 10, seconds=1.0)
    log.event("release", 10, folder="releases/step-00000010")
    log.event("rank-lost", 15, problem="connection closed by peer")
    write_resume(log, 10)
    log.event("done", 20)
    shown = TrackioData(run.path.parent)
    assert shown.vertical_lines("releases") == [(10, 1 + 8 / 10, 9.0)]
    assert shown.vertical_lines("trouble") == [(15, 1 + 8 / 10, 9.0)]
    assert shown.values("small/mark/releases", "tokens")[-1] == (10, 10 * BATCH_TOKENS)
    assert {shown.names[run] for run in shown.ids} == {"small", "releases of small", "trouble of small"}
    assert (shown.groups["small"], shown.groups["small/mark/releases"]) == ("runs", "marks of small")
    assert shown.ids[-1] == "small"  # the newest: listed first and coloured first
    (alert,) = shown.alerts
    assert (alert["title"], alert["level"]) == ("rank-lost at step 15 of small", "error")
    assert alert["text"] == "connection closed by peer"


def test_only_the_newest_lines_and_alerts_are_kept(run: RunDir, log: RunLog) -> None:
    write_steps(log, 1, 200)
    for number in range(1, 60):
        log.event("skip", number, reason="loss nan")
    TrackioData(run.path.parent)
    for number in range(60, 100):
        log.event("skip", number, reason="loss nan")
    shown = TrackioData(run.path.parent)
    assert [at for at, *_ in shown.vertical_lines("trouble")] == [*range(100 - MAX_ANNOTATIONS, 100)]
    assert {alert["step"] for alert in shown.alerts} == {*range(100 - MAX_ALERTS, 100)}


def test_scores_are_at_their_tokens_and_baselines_are_flat_lines(run: RunDir, log: RunLog) -> None:
    write_steps(log, 1, 20)
    log.event("checkpoint", 10, seconds=0.0)
    write_release(run, 10, 30.0, [{"name": "Big", "hellaswag": 60.0, "source": "published, a card"}])
    write_json(run.releases.baseline_path("here"), evaluation("models/here", None, 55.0))
    shown = TrackioData(run.path.parent)
    metric = "scores/hellaswag acc_norm"
    ((number, points),) = shown.values("small", metric)
    assert (number, round(points, 6)) == (10, 30.0)
    row = next(row for row in shown.logs["small"] if metric in row)
    assert row["tokens"] == 10 * BATCH_TOKENS
    assert shown.logs["small"][-1]["step"] == 20  # scores lie in between, or the page would smooth one into the next
    big = "small/baseline/Big (published)"
    assert shown.values(big, metric) == [(0, 60.0), (40, 60.0)]
    assert shown.values(big, "tokens")[1:] == [(0, 0), (40, 40 * BATCH_TOKENS)]
    assert (shown.names[big], shown.groups[big]) == ("Big (published)", "baselines of small")
    assert shown.values("small/baseline/models/here", "scores/boolq acc") == [(0, 50.0), (40, 50.0)]


def test_an_unreadable_run_does_not_hide_the_others(tmp_path: Path) -> None:
    for name in ("one", "two", "broken"):
        _, log = new_run(tmp_path, name)
        write_steps(log, 1, 3)
        if name == "broken":
            log.run.metrics_path.write_text("no row\n")
    new_run(tmp_path, "older")
    (tmp_path / "runs/older/recipe.yaml").write_text("name: 3\nmodel: {}\n")
    shown = TrackioData(tmp_path / "runs")
    assert {"one", "two"} <= {*shown.ids}
    broken, older = shown.stderr.splitlines()
    assert broken.startswith(f"{tmp_path / 'runs/broken'}: no longer shown: ")
    assert "metrics.jsonl:1: " in broken
    assert older.startswith(f"{tmp_path / 'runs/older'}: no longer shown: {tmp_path / 'runs/older'}/recipe.yaml")


def test_a_run_followed_by_another_process_is_not_fed(run: RunDir, log: RunLog) -> None:
    write_steps(log, 1, 3)
    with ExitStack() as locks:
        assert try_acquire_sink(run, "trackio", locks)
        assert TrackioData(run.path.parent).ids == []
    assert {*TrackioData(run.path.parent).ids} == {*ENTRIES}
