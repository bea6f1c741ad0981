"""A run's folder as `RunDir` reads it."""

import json
from pathlib import Path

import pytest

from tinyllama.errors import InputError
from tinyllama.files import last_rows, rows_since, sha256_of, write_json
from tinyllama.runs.run_dir import CheckpointDir, RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def make_checkpoint(run: RunDir, step: int, milestone: bool = False) -> CheckpointDir:
    checkpoint = run.checkpoint(step)
    write_json(checkpoint.state_path, {"step": step, "vocab_size": 7, "milestone": milestone})
    write_json(checkpoint.commit_path, {"sha256": {"state.json": sha256_of(checkpoint.state_path)}})
    return checkpoint


def write_lines(path: Path, *lines: object, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + end)


def test_checkpoints_are_sorted_by_step_and_incomplete_ones_skipped(run: RunDir) -> None:
    for step in (100_000_000, 99, 5):
        make_checkpoint(run, step)
    run.checkpoint(200_000_000).path.mkdir()
    (run.checkpoints_dir / "step-6x").mkdir()
    write_json(run.checkpoints_dir / "step-6x" / "commit.json", {})
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [5, 99, 100_000_000]
    assert run.find_checkpoint().step == 100_000_000
    assert run.find_checkpoint(99) == run.checkpoint(99)
    with pytest.raises(InputError, match=r"step 7.*5, 99"):
        run.find_checkpoint(7)


def test_prune_keeps_the_newest_the_milestones_and_what_their_releases_average(run: RunDir) -> None:
    for step in range(1, 9):
        make_checkpoint(run, step, milestone=step in (2, 5))
    write_json(run.releases.release(run.checkpoint(2).name).metadata_path, {})
    run.checkpoint(9).path.mkdir()
    run.prune_checkpoints(keep=2, average=3)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 3, 4, 5, 7, 8]
    assert not run.checkpoint(9).path.exists()


def test_pending_milestones_lack_a_release_of_their_content(run: RunDir) -> None:
    checkpoints = [make_checkpoint(run, step, milestone=step > 1) for step in range(1, 5)]
    rows = [
        {"step": 2, "commit": checkpoints[1].commit_hash, "complete": True},
        {"step": 3, "commit": checkpoints[2].commit_hash, "complete": False},
        {"step": 4, "commit": "of an earlier run", "complete": True},
    ]
    write_json(run.releases.table_path, {"releases": rows, "baselines": []})
    assert run.pending_milestones() == [3, 4]


def test_metrics_end_at_a_step_and_report_later_damage(run: RunDir) -> None:
    write_lines(run.metrics_path, {"step": 1}, {"step": 2}, "{", {"step": 3}, {"x": 1}, '{"step": 4', end="")
    damaged: list[int] = []
    assert [row["step"] for row in run.metrics(2, damaged)] == [1, 2]
    assert damaged == [3, 5]
    with pytest.raises(InputError, match=r"metrics\.jsonl:3:"):
        list(run.metrics(3))
    with pytest.raises(InputError, match=r"metrics\.jsonl:3:"):
        list(run.metrics())


def test_rows_since_an_offset_are_complete_lines(run: RunDir) -> None:
    assert rows_since(run.metrics_path, 0) == ([], 0)
    write_lines(run.metrics_path, {"step": 1}, {"step": 2, "loss": float("nan")}, '{"step":', end="")
    rows, offset = rows_since(run.metrics_path, 0)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows_since(run.metrics_path, offset) == ([], offset)
    write_lines(run.metrics_path, {"step": 1})  # shorter: read from the beginning
    assert rows_since(run.metrics_path, offset)[0] == [{"step": 1}]
    write_lines(run.metrics_path, {"step": 1}, "[]")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2:"):
        rows_since(run.metrics_path, 0)


def test_last_rows_skip_invalid_and_partial_lines(run: RunDir) -> None:
    write_lines(run.events_path, {"step": 1, "event": "start"}, "x", "[1]", {"step": 2, "event": "done"}, "{", end="")
    assert [row["step"] for row in last_rows(run.events_path, 1 << 10)] == [1, 2]
    assert [row["step"] for row in last_rows(run.events_path, 40)] == [2]


def test_a_release_belongs_to_the_checkpoint_with_the_same_content(run: RunDir) -> None:
    checkpoint = make_checkpoint(run, 5)
    release = run.releases.release(checkpoint.name)
    assert not checkpoint.is_released_as(release)
    metadata = {"step": 5, "files": {}, "checkpoints": {checkpoint.name: checkpoint.commit_hash}}
    write_json(release.metadata_path, metadata)
    assert checkpoint.is_released_as(release)
    write_json(release.metadata_path, metadata | {"checkpoints": {checkpoint.name: "of an earlier run"}})
    assert not checkpoint.is_released_as(release)


def test_an_evaluation_of_another_step_is_ignored(run: RunDir) -> None:
    release = run.releases.release("step-00000005")
    write_json(release.metadata_path, {"step": 5, "files": {}})
    assert release.evaluation() is None
    write_json(release.evaluation_path, {"step": 4})
    assert release.evaluation() is None
    write_json(release.evaluation_path, {"step": 5})
    assert release.evaluation() == {"step": 5}


@pytest.mark.parametrize("metadata", [None, [], {"step": 5}, {"files": {"../outside": {}}}])
def test_invalid_metadata_of_a_release_is_an_error(run: RunDir, metadata: object) -> None:
    release = run.releases.release("step-00000005")
    if metadata is not None:
        write_json(release.metadata_path, metadata)
    with pytest.raises(InputError, match="step-00000005"):
        release.metadata()
