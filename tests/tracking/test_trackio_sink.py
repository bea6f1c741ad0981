"""What trackio's page gets of a run: read back from its own storage, in processes, since it has one folder in each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tracking.recorded import BATCH_TOKENS, evaluation, new_run, release, resume, step

from tinyllama.files import write_json
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.trackers import try_acquire_sink
from tinyllama.tracking.trackio_sink import ALERTS, MAX_ANNOTATIONS

ENTRIES = ("small", "small/mark/releases", "small/mark/trouble")
_FEED = """
import sys
from pathlib import Path
from tinyllama.tracking.watch import TrackioFeeder
with TrackioFeeder(Path(sys.argv[1])) as feeder:
    feeder.feed()
    feeder.feed()
"""
_READ = """
import json, trackio
storage = trackio.SQLiteStorage
runs = storage.get_run_records("tinyllama")
logs = {run["id"]: storage.get_logs("tinyllama", run_id=run["id"]) for run in runs}
configs = storage.get_all_run_configs("tinyllama")
print(json.dumps([[run["id"] for run in runs], {run["id"]: run["name"] for run in runs}, logs,
                  storage.get_alerts("tinyllama"), {run: configs[run].get("_Group") for run in configs}]))
"""
_EMPTY_WHILE_LOOKING = """
import sys, threading
from pathlib import Path
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import SinkPosition
from tinyllama.tracking.trackio_sink import PROJECT, TrackioSink
run = RunDir(Path(sys.argv[1]) / "small")
page = TrackioSink(run, run.recipe(), SinkPosition(step=1))
seen, ended = set(), threading.Event()
looks = 0
def look():
    global looks
    while not ended.is_set():
        looks += 1
        seen.add(tuple(sorted(record["id"] for record in page.storage.get_run_records(PROJECT))))
looking = threading.Thread(target=look, daemon=True)
looking.start()
while looks < 1000 and looking.is_alive():
    page.rewind(0)
ended.set()
looking.join()
assert looks >= 1000
print("; ".join(map(" ".join, seen)))
"""


def python(program: str, folder: Path) -> tuple[str, str]:
    environment = os.environ | {"TRACKIO_DIR": str(folder / ".trackio")}
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


class Shown:
    """All that the page has of the runs of a folder, after they were fed to it."""

    def __init__(self, folder: Path) -> None:
        shown, self.said = python(_FEED + _READ, folder)
        ids, self.names, self.logs, self.alerts, self.groups = json.loads(shown)
        self.ids: list[str] = ids

    def of(self, run: str, metric: str = "loss") -> list[tuple[int, float]]:
        return [(row["step"], row[metric]) for row in self.logs[run] if metric in row]

    def uprights(self, kind: str, run: str = "small") -> list[tuple[int, float, float]]:
        """Step, lowest and highest point of each; between two of them is what is no number."""
        losses = [(row["step"], row["loss"]) for row in self.logs[f"{run}/mark/{kind}"] if "loss" in row]
        assert all(isinstance(gap, dict) for _, gap in losses[2::3])
        assert len({low[0] == high[0] for low, high in zip(losses[::3], losses[1::3], strict=True)} - {True}) == 0
        return [(low[0], low[1], high[1]) for low, high in zip(losses[::3], losses[1::3], strict=True)]


def test_metrics_are_there_once_with_tokens_and_readable_names(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 3)
    Shown(run.parent)
    step(journal, 4, 4, validation_loss=2.0)
    shown = Shown(run.parent)
    assert [number for number, _ in shown.of("small")] == [1, 2, 3, 4]
    assert shown.of("small", "tokens") == [(number, number * BATCH_TOKENS) for number in (1, 2, 3, 4)]
    assert shown.of("small", "memory_gigabytes")[0] == (1, 1.0)
    assert shown.of("small", "validation_loss") == [(4, 2.0)]


def test_rows_and_alerts_that_were_shown_before_a_kill_that_forgot_it_are_not_there_twice(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 3)
    Shown(run.parent)
    before = (run / "trackers/trackio.json").read_bytes()
    step(journal, 4, 6)
    journal.event("failed", 6, problem="none")
    Shown(run.parent)
    (run / "trackers/trackio.json").write_bytes(before)
    shown = Shown(run.parent)
    assert [number for number, _ in shown.of("small")] == [1, 2, 3, 4, 5, 6]
    assert len(shown.alerts) == 1


def test_after_a_rollback_the_page_has_the_new_numbers_alone(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 25)
    Shown(run.parent)
    journal.event("rollback", 26, reason="spike", checkpoint=20, skipped_batches=[24, 25])
    resume(journal, 20)
    step(journal, 21, 24, change=0.5)
    shown = Shown(run.parent)
    assert shown.of("small")[19:] == [(20, 1 + 8 / 20), *((at, 1 + 8 / at + 0.5) for at in (21, 22, 23, 24))]
    assert [at for at, *_ in shown.uprights("trouble")] == [26]


def test_an_entry_whose_rows_are_replaced_is_never_gone_for_a_moment_or_an_open_page_would_untick_it(
    tmp_path: Path,
) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 25)
    Shown(run.parent)
    seen, _ = python(_EMPTY_WHILE_LOOKING, run.parent)
    assert seen == f"{' '.join(ENTRIES)}\n"


def test_another_run_of_the_same_name_has_a_page_of_its_own(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path / "first")
    step(journal, 1, 9)
    journal.event("signal", 9, signal="SIGTERM")
    release(run, 9, 30.0, [{"name": "Big", "hellaswag": 60.0, "source": "published, a card"}])
    Shown(run.parent)
    other, journal = new_run(tmp_path / "second")
    step(journal, 1, 2)
    (run.parent / ".trackio").rename(other.parent / ".trackio")
    shown = Shown(other.parent)
    assert ({*shown.ids}, [at for at, _ in shown.of("small")], len(shown.alerts)) == ({*ENTRIES}, [1, 2], 0)
    assert shown.uprights("trouble") == []


def test_releases_and_trouble_are_upright_marks_on_the_loss_and_trouble_alone_is_an_alert(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 20)
    journal.event("checkpoint", 10, seconds=1.0)
    journal.event("release", 10, folder="releases/step-00000010")
    journal.event("rank-lost", 15, problem="connection closed by peer")
    resume(journal, 10)
    journal.event("done", 20)
    shown = Shown(run.parent)
    assert shown.uprights("releases") == [(10, 1 + 8 / 10, 9.0)]
    assert shown.uprights("trouble") == [(15, 1 + 8 / 10, 9.0)]
    assert shown.of("small/mark/releases", "tokens")[-1] == (10, 10 * BATCH_TOKENS)
    assert {shown.names[run] for run in shown.ids} == {"small", "releases of small", "trouble of small"}
    assert (shown.groups["small"], shown.groups["small/mark/releases"]) == ("runs", "marks of small")
    assert shown.ids[-1] == "small"  # the newest: listed first and coloured first
    (alert,) = shown.alerts
    assert (alert["title"], alert["level"]) == ("rank-lost at step 15 of small", "error")
    assert alert["text"] == "connection closed by peer"


def test_a_run_with_much_trouble_has_the_newest_marks_and_alerts_and_no_more(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 200)
    for number in range(1, 60):
        journal.event("skip", number, reason="loss nan")
    Shown(run.parent)
    for number in range(60, 100):
        journal.event("skip", number, reason="loss nan")
    shown = Shown(run.parent)
    assert [at for at, *_ in shown.uprights("trouble")] == [*range(100 - MAX_ANNOTATIONS, 100)]
    assert {alert["step"] for alert in shown.alerts} == {*range(100 - ALERTS, 100)}


def test_scores_stand_at_their_tokens_and_baselines_are_flat_lines(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 20)
    journal.event("checkpoint", 10, seconds=0.0)
    release(run, 10, 30.0, [{"name": "Big", "hellaswag": 60.0, "source": "published, a card"}])
    write_json(run / "releases/baselines/here.json", evaluation("models/here", None, 55.0))
    shown = Shown(run.parent)
    metric = "scores/hellaswag acc_norm"
    ((number, points),) = shown.of("small", metric)
    assert (number, round(points, 6)) == (10, 30.0)
    row = next(row for row in shown.logs["small"] if metric in row)
    assert row["tokens"] == 10 * BATCH_TOKENS
    assert shown.logs["small"][-1]["step"] == 20  # scores lie in between, or the page would smooth one into the next
    big = "small/baseline/Big (published)"
    assert shown.of(big, metric) == [(0, 60.0), (40, 60.0)]
    assert shown.of(big, "tokens")[1:] == [(0, 0), (40, 40 * BATCH_TOKENS)]
    assert (shown.names[big], shown.groups[big]) == ("Big (published)", "baselines of small")
    assert shown.of("small/baseline/models/here", "scores/boolq acc") == [(0, 50.0), (40, 50.0)]


def test_runs_of_a_folder_are_on_one_page_and_one_that_cannot_be_read_does_not_keep_the_others_off(
    tmp_path: Path,
) -> None:
    for name in ("one", "two", "broken"):
        _, journal = new_run(tmp_path, name)
        step(journal, 1, 3)
        if name == "broken":
            journal.run.metrics_path.write_text("no row\n")
    new_run(tmp_path, "older")
    (tmp_path / "runs/older/recipe.yaml").write_text("name: 3\nmodel: {}\n")
    shown = Shown(tmp_path / "runs")
    assert {"one", "two"} <= {*shown.ids}
    broken, older = shown.said.splitlines()
    assert broken.startswith(f"{tmp_path / 'runs/broken'}: no longer shown: ")
    assert "metrics.jsonl:1: " in broken
    assert older.startswith(f"{tmp_path / 'runs/older'}: no longer shown: {tmp_path / 'runs/older'}/recipe.yaml")


def test_a_run_that_another_process_follows_is_left_to_it(tmp_path: Path) -> None:
    from contextlib import ExitStack

    run, journal = new_run(tmp_path)
    step(journal, 1, 3)
    with ExitStack() as locks:
        assert try_acquire_sink(RunDir(run), "trackio", locks)
        assert Shown(run.parent).ids == []
    assert {*Shown(run.parent).ids} == {*ENTRIES}


def test_what_an_older_version_logged_under_this_name_gives_way(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 3)
    rows: list[Any] = [{"loss": 1.0}, {"loss": 2.0}]
    log = f"import trackio; trackio.SQLiteStorage.bulk_log('tinyllama', 'small', {rows}, [1, 2], run_id='f00')"
    python(log, run.parent)
    shown = Shown(run.parent)
    assert ({*shown.ids}, len(shown.logs["small"])) == ({*ENTRIES}, 3)
