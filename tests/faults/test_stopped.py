"""Commands that end in the middle of their work: prepare and its workers, uploads, releases, evaluation."""

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
from tests.faults.commands import CommandResult, assert_one_line, assert_succeeds, kill_at_write, run_command
from tests.faults.conftest import RELEASE, RUN, skip_peak
from tests.release.hub import TOKEN, running_hub
from tests.train.launch import event_steps, read_events

from tinyllama.files import read_json
from tinyllama.prepare.tasks import Job
from tinyllama.recipe import Recipe
from tinyllama.release.release import release_milestone
from tinyllama.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

KILL_OR_TERM = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
HERE = Path(__file__).parent


def test_commands_that_only_read_write_nothing(pipeline: Path) -> None:
    """They may therefore end at any moment."""

    def times_and_sizes() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in pipeline.rglob("*")}

    before = times_and_sizes()
    for command in (("inspect", "store", "--verify"), ("verify", RELEASE), ("generate", RUN, "import"), ("runs",)):
        assert_succeeds(pipeline, *command)
    assert times_and_sizes() == before


@KILL_OR_TERM
def test_prepare_killed_while_it_writes_a_shard_resumes_to_the_same_store(
    pipeline: Path, number: signal.Signals
) -> None:
    command = ("prepare", "recipe.yaml", "--data.store", "other")
    killed = run_command(pipeline, *command, fault=kill_at_write("00000.tokens", number))
    assert killed.status in (-number, 2), killed.output
    assert_one_line(run_command(pipeline, "train", "recipe.yaml", "--data.store", "other"), "other")
    assert_succeeds(pipeline, *command)
    assert contents(pipeline / "other") == contents(pipeline / "store")


def has_ended(process: int) -> bool:
    """Return whether a process does not exist or is a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@KILL_OR_TERM
def test_workers_of_prepare_end_with_it_and_it_resumes_to_the_same_store(
    pipeline: Path, number: signal.Signals
) -> None:
    """The workers would wait without end; prepare is killed once both have started."""

    def workers() -> list[int]:
        return [int(path.name.removeprefix("worker-")) for path in pipeline.glob("worker-*")]

    def wait_without_end(job: Job, stage: str, rank: int) -> None:
        (pipeline / f"worker-{os.getpid()}").touch()
        signal.pause()

    def kill_after_both_started(*_: object) -> None:
        while len(workers()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    def inject() -> None:
        from tinyllama.prepare import executors

        executors.run_task = wait_without_end  # type: ignore[attr-defined]
        executors.as_completed = kill_after_both_started  # type: ignore[attr-defined, assignment]

    command = ("prepare", "recipe.yaml", "--data.store", "other", "--data.workers", "2")
    killed = run_command(pipeline, *command, fault=inject)
    assert killed.status == -number, killed.output
    deadline = time.monotonic() + 30
    while (left := [process for process in workers() if not has_ended(process)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert (len(workers()), left) == (2, [])
    assert_succeeds(pipeline, *command)
    assert contents(pipeline / "other") == contents(pipeline / "store")


@KILL_OR_TERM
def test_push_killed_before_its_commit_changes_nothing_and_can_be_repeated(
    pipeline: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inject() -> None:
        send = httpx.Client.send

        def faulty_send(self: httpx.Client, request: httpx.Request, **options: object) -> httpx.Response:
            if "/commit/" in str(request.url):
                os.kill(os.getpid(), number)
            return send(self, request, **options)  # type: ignore[arg-type]

        httpx.Client.send = faulty_send  # type: ignore[method-assign]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command = ("release", RELEASE, "--push", "ada/small")
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        killed = run_command(pipeline, *command, fault=inject)
        assert killed.status == -number, killed.output
        repository = hub.repositories["ada/small"]
        assert (repository.commits, repository.files) == ([], {})
        assert_succeeds(pipeline, *command)
        files = {name.removeprefix("huggingface/"): data for name, data in contents(pipeline / RELEASE).items()}
        assert hub.repositories["ada/small"].files == files
        assert len(hub.repositories["ada/small"].commits) == 1


def test_milestone_release_killed_before_its_event_has_one_event(pipeline: Path) -> None:
    run = pipeline / RUN
    recipe = Recipe.load(run / "recipe.yaml", {"release.tasks": []})
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    others = [row for row in read_events(run) if row["event"] != "release"]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    for _ in range(2):
        release_milestone(RunDir(run), 12)
        assert event_steps(run, "release") == [12]


def test_evaluation_that_loses_a_rank_fails_and_keeps_the_previous_scores(pipeline: Path) -> None:
    before = contents(pipeline / RELEASE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(HERE / "killed_rank_program.py"), "evaluate", str(RELEASE)]
    options = ["--tasks", "piqa", "--limit", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options], cwd=pipeline, env=environment, capture_output=True, check=False, timeout=200
    )
    assert done.returncode != 0
    assert contents(pipeline / RELEASE) == before


def test_release_sidecar_without_memory_is_an_event_and_training_continues(pipeline: Path) -> None:
    """The sidecar may use less memory than importing torch takes."""

    def inject() -> None:
        from tinyllama import processes
        from tinyllama.train import milestones

        def limit_memory() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))

        skip_peak()
        milestones._RETRY_SECONDS = 0.0
        limited = partial(subprocess.Popen, preexec_fn=limit_memory)
        processes.subprocess = SimpleNamespace(Popen=limited, PIPE=subprocess.PIPE)  # type: ignore[assignment,attr-defined]

    at = ("--release.at_tokens", f"[{6 * 6 * 64}]", "--release.tasks", "[]", "--release.formats", "[huggingface]")
    command = ("train", "recipe.yaml", "--name", "starved", *at)
    result = run_command(pipeline, *command, fault=inject)
    assert_one_line(result, "release of step 6", status=(1,))
    run = pipeline / "runs/starved"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 12
    assert len(read_events(run, "release-failed")) == 3
    assert_succeeds(pipeline, *command, fault=skip_peak)
    assert (run / "releases/step-00000006/release.json").is_file()


def test_worker_without_memory_is_reported_and_loses_nothing(pipeline: Path) -> None:
    """orjson needs 264 MiB for the line of 23 MB, which is more than the workers may have."""
    with (pipeline / "raw/modules/c.jsonl").open("w") as file:
        file.write('{"text": "' + "A long, long document. " * 1_000_000 + '"}\n')
    command = ("prepare", "recipe.yaml", "--data.workers", "2", "--data.store")
    limited = [sys.executable, str(HERE / "memory_limited_program.py"), *command, "other", "--quiet"]
    one_arena = os.environ | {"MALLOC_ARENA_MAX": "1"}  # each arena reserves 64 MiB
    done = subprocess.run(
        limited, cwd=pipeline, env=one_arena, capture_output=True, text=True, check=False, timeout=200
    )
    assert_one_line(CommandResult(done.returncode, done.stdout + done.stderr), "memory")
    before = {shard: shard.stat().st_mtime_ns for shard in finished_shards(pipeline / "other")}
    assert before, "of two workers, which start with the small files, one finishes a task before the large one"
    for store in ("other", "reference"):
        assert_succeeds(pipeline, *command, store)
    assert {shard: shard.stat().st_mtime_ns for shard in before} == before, "finished tasks are not repeated"
    assert contents(pipeline / "other") == contents(pipeline / "reference")


def finished_shards(store: Path) -> list[Path]:
    """Return the shards of all tasks with a completion record."""
    records = [
        (path.name.split(".")[0], read_json(path)) for path in store.glob(".work/completion_records/tokens/*.json")
    ]
    return [
        store / source / split / shard["file"]
        for source, record in records
        for split, shard in record["shards"].items()
    ]
