"""What must hold of a round that was killed again and again, beside one to which nothing happened.

Reads both rounds' folders whole. Nothing may be lost or done twice: bytes, weights, steps, releases and events.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import contents
from tests.tracking.test_trackio_sink import TrackioData
from tests.train.launch import read_events, read_losses, read_metrics

from tinyllama.data.verification import find_corruption as store_problems
from tinyllama.files import read_json, sha256_of
from tinyllama.release.verify import file_checks
from tinyllama.runs.run_dir import RunDir

CHECKPOINT_STEPS = 10
_TIMED = {"date", "checkpoints", "files", "hardware"}
"""Of release.json: when it was trained; the checkpoint's commit, whose state has that time; the hashes of the rest; the
measured peak of the machine."""


def assert_same_results(folder: Path, wanted: Path, run: Path, steps: int, milestones: Sequence[int]) -> str:
    """What was compared, in words. Raises AssertionError where something is not as in `wanted`."""
    assert contents(folder / "tokenizer") == contents(wanted / "tokenizer"), "another tokenizer"
    assert contents(folder / "store") == contents(wanted / "store"), "another store"
    assert store_problems(folder / "store") == []
    ours, theirs = folder / run, wanted / run
    assert [step for step, _ in read_losses(ours)] == list(range(1, steps + 1)), "steps are missing or twice there"
    assert metrics_without_speed(ours) == metrics_without_speed(theirs), "other losses"
    compare_checkpoints(ours, theirs, steps)
    compare_releases(ours, theirs, milestones)
    check_events(ours, steps, milestones)
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".replaced"))]
    assert not left, f"left behind: {left}"
    shown = TrackioData(folder / run.parent).values(run.name)
    assert [step for step, _ in shown] == list(range(1, steps + 1)), "the page has steps twice or not at all"
    resumes = len(read_events(ours, "start", "resume"))
    return f"store, {steps} steps, weights, {len(milestones)} releases and page as undisturbed; {resumes} starts"


def metrics_without_speed(run: Path) -> list[tuple[Any, ...]]:
    """What each row says that does not depend on the machine's speed."""
    names = ("step", "tokens", "loss", "learning_rate", "gradient_norm", "validation_loss")
    return [tuple(row.get(name) for name in names) for row in read_metrics(run)]


def compare_checkpoints(ours: Path, theirs: Path, steps: int) -> None:
    """The last checkpoint's tensors, weights and moments, are the same bytes."""
    newest = RunDir(ours).find_checkpoint()
    assert (newest.step, newest.find_damage()) == (steps, [])
    last, other = newest.path, RunDir(theirs).checkpoint(steps).path
    names = {path.name for path in other.glob("*.distcp")}
    assert names == {path.name for path in last.glob("*.distcp")}
    differing = [name for name in sorted(names) if sha256_of(last / name) != sha256_of(other / name)]
    assert not differing, f"other tensors: {differing}"


def compare_releases(ours: Path, theirs: Path, milestones: Sequence[int]) -> None:
    """Each milestone's release is there, whole, once, and the same."""
    names = [f"step-{step:08d}" for step in milestones]
    assert sorted(path.name for path in (ours / "releases").iterdir() if path.is_dir()) == names
    rows = read_json(ours / "releases/releases.json")["releases"]
    assert [(row["step"], row["complete"]) for row in rows] == [(step, True) for step in milestones]
    for name in names:
        own, other = ours / "releases" / name, theirs / "releases" / name
        facts, expected = read_json(own / "release.json"), read_json(other / "release.json")
        assert all(check.passed for check in file_checks(own, facts["files"])), f"{name}: not as its release.json says"
        same = [{key: value for key, value in one.items() if key not in _TIMED} for one in (facts, expected)]
        assert same[0] == same[1], f"{name}: release.json says something else"
        files, others = files_without_times(own, facts), files_without_times(other, expected)
        assert files.keys() == others.keys()
        differing = [file for file in files if files[file] != others[file]]
        assert not differing, f"{name}: other files: {differing}"


def files_without_times(folder: Path, facts: Any) -> dict[str, bytes]:
    """Return a release's files but release.json, the card without date, checkpoint's commit and measured peak."""
    files = contents(folder)
    del files["release.json"]
    card = files["huggingface/README.md"]
    for word in (facts["date"], *facts["checkpoints"].values()):
        card = card.replace(word.encode(), b"...")
    return files | {"huggingface/README.md": re.sub(rb"peak [0-9.]+ TFLOP/s", b"...", card)}


def check_events(run: Path, steps: int, milestones: Sequence[int]) -> None:
    """They tell one life after another: each goes on from a checkpoint that was there, and the last is done."""
    events = read_events(run)
    assert (run / "events.jsonl").read_bytes().endswith(b"\n")
    assert events[0]["event"] == "start"
    assert [event["step"] for event in events if event["event"] == "done"][-1:] == [steps]
    reached = 0
    for event in events:
        if event["event"] in ("start", "resume"):
            # A kill between a checkpoint's commit and its event leaves a checkpoint without one.
            last = reached + CHECKPOINT_STEPS
            assert event["step"] <= last, f"resumed from step {event['step']}, the last checkpoint is {reached}"
        reached = max(reached, event["step"])
    assert not {"failed", "checkpoint-failed", "checkpoint-damaged", "rollback", "skip", "hang"} & {
        event["event"] for event in events if event["event"] != "failed" or "release" not in event["problem"]
    }
    trained = events[: max(number for number, event in enumerate(events) if event["event"] == "done")]
    released = Counter(event["step"] for event in trained if event["event"] == "release")
    assert released == Counter(milestones), f"events of releases: {released}"
