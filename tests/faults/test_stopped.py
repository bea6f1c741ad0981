"""Ends in the middle of what has no half: reading commands, an upload, tasks of prepare, ranks that score."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import constants
from tests.conftest import contents
from tests.faults.commands import CommandResult, assert_one_line, kill_at_write, run_command
from tests.faults.conftest import RELEASE, RUN, skip_peak
from tests.release.hub import TOKEN, running_hub
from tests.train.launch import read_events

from tinyllama.files import read_json
from tinyllama.prepare.tasks import Job
from tinyllama.recipe import Recipe
from tinyllama.release.milestone import release_milestone

pytestmark = pytest.mark.slow

# A worker may have 100 MiB more than it begins with: orjson asks for 264 MiB for a line of 23 MB. A process of its own,
# since what the tests before have freed here, several 100 MiB at times, would be enough for it.
STARVING = """
import os, resource, sys
from pathlib import Path
from tinyllama import cli
def starve():
    may = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (100 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (may, may))
os.register_at_fork(after_in_child=starve)
sys.exit(cli.main())
"""
BOTH = pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGTERM])


def test_commands_that_only_read_write_nothing_so_that_they_may_end_at_any_moment(way: Path) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in way.rglob("*")}

    before = state()
    for words in (("inspect", "store", "--verify"), ("verify", RELEASE), ("generate", RUN, "import"), ("runs",)):
        ended = run_command(way, *words)
        assert ended.status == 0, ended.said
    assert state() == before


@BOTH
def test_prepare_ended_while_it_writes_a_shard_makes_the_same_store_when_it_goes_on(
    way: Path, what: signal.Signals
) -> None:
    again = ("prepare", "recipe.yaml", "--data.store", "other")
    died = run_command(way, *again, fault=kill_at_write("00000.tokens", what))
    assert died.status in (-what, 2), died.said
    assert_one_line(run_command(way, "train", "recipe.yaml", "--data.store", "other"), "other", "not finished")
    ended = run_command(way, *again)
    assert ended.status == 0, ended.said
    assert contents(way / "other") == contents(way / "store")


def has_ended(process: int) -> bool:
    """Whether there is no such process any more, or only the status that nobody has asked it for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@BOTH
def test_workers_of_prepare_end_with_it_and_it_goes_on_to_the_same_store(way: Path, what: signal.Signals) -> None:
    """They would work for ever; it ends once both are at it."""

    def workers() -> list[int]:
        return [int(path.name.removeprefix("worker-")) for path in way.glob("worker-*")]

    def work(job: Job, stage: str, rank: int) -> None:
        (way / f"worker-{os.getpid()}").touch()
        signal.pause()

    def end(*given: object) -> None:
        while len(workers()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), what)

    def plant() -> None:
        from tinyllama.prepare import executors

        executors.run_task = work  # type: ignore[attr-defined]
        executors._wait = end  # type: ignore[assignment]

    again = ("prepare", "recipe.yaml", "--data.store", "other", "--data.workers", "2")
    died = run_command(way, *again, fault=plant)
    assert died.status == -what, died.said
    deadline = time.monotonic() + 30
    while (left := [process for process in workers() if not has_ended(process)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert (len(workers()), left) == (2, [])
    ended = run_command(way, *again)
    assert ended.status == 0, ended.said
    assert contents(way / "other") == contents(way / "store")


@BOTH
def test_a_push_ended_before_its_commit_has_changed_nothing_and_again_is_whole(
    way: Path, what: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plant() -> None:
        send = httpx.Client.send

        def planted(self: httpx.Client, request: httpx.Request, **more: object) -> httpx.Response:
            if "/commit/" in str(request.url):
                os.kill(os.getpid(), what)
            return send(self, request, **more)  # type: ignore[arg-type]

        httpx.Client.send = planted  # type: ignore[method-assign]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = ("release", RELEASE, "--push", "ada/small")
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        died = run_command(way, *words, fault=plant)
        assert died.status == -what, died.said
        assert (hub.repositories["ada/small"].commits, hub.repositories["ada/small"].files) == ([], {})
        ended = run_command(way, *words)
        assert ended.status == 0, ended.said
        files = {name.removeprefix("huggingface/"): data for name, data in contents(way / RELEASE).items()}
        assert hub.repositories["ada/small"].files == files
        assert len(hub.repositories["ada/small"].commits) == 1


def test_a_milestone_whose_release_was_killed_before_it_could_say_so_has_one_event(way: Path) -> None:
    run = way / RUN
    recipe = Recipe.load(run / "recipe.yaml", {"release.tasks": []})
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    others = [row for row in read_events(run) if row["event"] != "release"]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    for _ in range(2):
        release_milestone(run, 12)
        assert [row["step"] for row in read_events(run, "release")] == [12]


SCORING = """
import os, signal, sys
from tinyllama.evaluate import evaluation
from tinyllama.cli import main
score = evaluation.evaluate
def dying(*given, **named):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return score(*given, **named)
evaluation.evaluate = dying
sys.exit(main())
"""


def test_an_evaluation_that_loses_a_rank_fails_and_leaves_the_scores_before(way: Path) -> None:
    (way / "scoring.py").write_text(SCORING)
    before = contents(way / RELEASE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "scoring.py"]
    words = ["evaluate", str(RELEASE), "--tasks", "piqa", "--limit", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *words], cwd=way, env=environment, capture_output=True, check=False, timeout=200)
    assert done.returncode != 0
    assert contents(way / RELEASE) == before


def test_a_release_beside_training_that_finds_no_memory_is_an_event_and_the_run_goes_on(way: Path) -> None:
    """Its process may not have more memory than importing torch takes."""

    def starve() -> None:
        from tinyllama.runs import sidecar
        from tinyllama.train import milestones

        def limit_memory() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))

        skip_peak()
        milestones._RETRY_SECONDS = 0.0
        limited = partial(subprocess.Popen, preexec_fn=limit_memory)
        sidecar.subprocess = SimpleNamespace(Popen=limited, PIPE=subprocess.PIPE)  # type: ignore[assignment,attr-defined]

    at = ("--release.at_tokens", f"[{6 * 6 * 64}]", "--release.tasks", "[]", "--release.formats", "[huggingface]")
    words = ("train", "recipe.yaml", "--name", "starved", *at)
    starved = run_command(way, *words, fault=starve)
    assert_one_line(starved, "the release of step 6 failed", status=(1,))
    lines = (way / "runs/starved/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert (way / "runs/starved/events.jsonl").read_text().count('"release-failed"') == 3
    ended = run_command(way, *words, fault=skip_peak)
    assert ended.status == 0, ended.said
    assert (way / "runs/starved/releases/step-00000006/release.json").is_file()


def test_a_worker_of_prepare_that_finds_no_memory_is_one_line_and_loses_nothing(way: Path) -> None:
    with (way / "raw/modules/c.jsonl").open("w") as file:
        file.write('{"text": "' + "A long, long document. " * 1_000_000 + '"}\n')
    words = ("prepare", "recipe.yaml", "--data.store", "other", "--data.workers", "2")
    command = [sys.executable, "-c", STARVING, *words, "--quiet"]
    one_arena = os.environ | {"MALLOC_ARENA_MAX": "1"}  # each reserves 64 MiB of what the worker may have
    starved = subprocess.run(command, cwd=way, env=one_arena, capture_output=True, text=True, check=False, timeout=200)
    assert_one_line(CommandResult(starved.returncode, starved.stdout + starved.stderr), "memory")
    done = {shard: shard.stat().st_mtime_ns for shard in finished_shards(way / "other")}
    assert done, "of two workers, who begin with the small files, one has ended its task before it takes the large one"
    for store in ("other", "calm"):
        ended = run_command(way, *words[:2], "--data.store", store, *words[4:])
        assert ended.status == 0, ended.said
    assert {shard: shard.stat().st_mtime_ns for shard in done} == done, "done work is not done again"
    assert contents(way / "other") == contents(way / "calm")


def finished_shards(store: Path) -> list[Path]:
    """The shards of all tasks that have a receipt."""
    receipts = [(path.name.split(".")[0], read_json(path)) for path in store.glob(".work/receipts/tokens/*.json")]
    return [
        store / source / split / shard["file"]
        for source, receipt in receipts
        for split, shard in receipt["shards"].items()
    ]
