"""Checks of a soak round: after many kills, its files must equal those of a round without kills.

Nothing may be lost or done twice: bytes, weights, steps, releases and events.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import contents
from tests.tracking.test_trackers import read_trackio
from tests.train.launch import read_events, read_losses, read_metrics

from tinyllama.files import read_json, sha256_of
from tinyllama.prepare.inspection import find_corruption
from tinyllama.release.verify import verify_files
from tinyllama.runs.run_dir import RunDir

CHECKPOINT_STEPS = 10
_TIMED_FIELDS = {"date", "checkpoints", "files", "hardware"}
"""Fields of release.json that depend on the time: the date, the hash of the checkpoint's commit (its state includes a
time), the hashes of other files, and the measured peak of the machine."""
_PROBLEMS = {"failed", "checkpoint-failed", "checkpoint-damaged", "rollback", "skip", "hang"}


def assert_same_results(folder: Path, reference: Path, run: Path, steps: int, milestones: Sequence[int]) -> str:
    """Compare a round with the reference round; return a summary. Raises AssertionError for a difference."""
    assert contents(folder / "tokenizer") == contents(reference / "tokenizer"), "another tokenizer"
    assert contents(folder / "store") == contents(reference / "store"), "another store"
    assert find_corruption(folder / "store") == []
    ours, theirs = folder / run, reference / run
    assert [step for step, _ in read_losses(ours)] == list(range(1, steps + 1)), "missing or repeated steps"
    assert metrics_without_speed(ours) == metrics_without_speed(theirs), "other losses"
    compare_checkpoints(ours, theirs, steps)
    compare_releases(ours, theirs, milestones)
    check_events(ours, steps, milestones)
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".replaced"))]
    assert not left, f"left behind: {left}"
    assert read_trackio(RunDir(ours))[0] == list(range(1, steps + 1)), "missing or repeated steps in trackio"
    starts = len(read_events(ours, "start", "resume"))
    return f"store, {steps} steps, weights, {len(milestones)} releases and trackio as in the reference; {starts} starts"


def metrics_without_speed(run: Path) -> list[tuple[Any, ...]]:
    """Return the metrics that do not depend on the speed of the machine."""
    keys = ("step", "tokens", "loss", "learning_rate", "gradient_norm", "validation_loss")
    return [tuple(row.get(key) for key in keys) for row in read_metrics(run)]


def compare_checkpoints(ours: Path, theirs: Path, steps: int) -> None:
    """Assert that the last checkpoints' tensors, weights and optimizer state, are the same bytes."""
    last = RunDir(ours).find_checkpoint()
    assert last.step == steps
    assert last.find_damage() == []
    other = RunDir(theirs).checkpoint(steps).path
    names = {path.name for path in other.glob("*.distcp")}
    assert names == {path.name for path in last.path.glob("*.distcp")}
    different = [name for name in sorted(names) if sha256_of(last.path / name) != sha256_of(other / name)]
    assert not different, f"other tensors: {different}"


def compare_releases(ours: Path, theirs: Path, milestones: Sequence[int]) -> None:
    """Assert that each milestone's release exists once, intact and equal to the reference."""
    names = [f"step-{step:08d}" for step in milestones]
    assert sorted(path.name for path in (ours / "releases").iterdir() if path.is_dir()) == names
    rows = RunDir(ours).releases.table()["releases"]
    assert [(row["step"], row["complete"]) for row in rows] == [(step, True) for step in milestones]
    for name in names:
        folder, other = ours / "releases" / name, theirs / "releases" / name
        metadata, expected = read_json(folder / "release.json"), read_json(other / "release.json")
        assert all(check.passed for check in verify_files(folder, metadata["files"])), f"{name}: damaged files"
        untimed = [
            {key: value for key, value in one.items() if key not in _TIMED_FIELDS} for one in (metadata, expected)
        ]
        assert untimed[0] == untimed[1], f"{name}: another release.json"
        files, others = files_without_times(folder, metadata), files_without_times(other, expected)
        assert files.keys() == others.keys()
        different = [file for file in files if files[file] != others[file]]
        assert not different, f"{name}: other files: {different}"


def files_without_times(folder: Path, metadata: Any) -> dict[str, bytes]:
    """Return a release's files without release.json, and the card without date, commit, peak and training time."""
    files = contents(folder)
    del files["release.json"]
    card = files["huggingface/README.md"]
    for word in (metadata["date"], *metadata["checkpoints"].values()):
        card = card.replace(word.encode(), b"...")
    return files | {"huggingface/README.md": re.sub(rb"peak [0-9.]+ TFLOP/s|training time \|.*", b"...", card)}


def check_events(run: Path, steps: int, milestones: Sequence[int]) -> None:
    """Assert that each process resumed from a step that was reached, that the last is done, and nothing failed."""
    events = read_events(run)
    assert (run / "events.jsonl").read_bytes().endswith(b"\n")
    assert events[0]["event"] == "start"
    assert [event["step"] for event in events if event["event"] == "done"][-1:] == [steps]
    reached = 0
    for event in events:
        if event["event"] in ("start", "resume"):
            # A kill between a checkpoint's commit and its event leaves a checkpoint without an event.
            last = reached + CHECKPOINT_STEPS
            assert event["step"] <= last, f"resumed from step {event['step']}, the last checkpoint is {reached}"
        reached = max(reached, event["step"])
    is_release = [event["event"] == "failed" and "release" in event["problem"] for event in events]
    problems = {event["event"] for event, expected in zip(events, is_release, strict=True) if not expected}
    assert not _PROBLEMS & problems
    trained = events[: max(number for number, event in enumerate(events) if event["event"] == "done")]
    released = Counter(event["step"] for event in trained if event["event"] == "release")
    assert released == Counter(milestones), f"events of releases: {released}"
