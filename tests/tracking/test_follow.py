"""A follower shows what is in a run's files, each item once, however often it or training restarts."""

from pathlib import Path
from typing import Any

import pytest
from tests.tracking.run_files import (
    BATCH_TOKENS,
    RecordingSink,
    evaluation,
    follow,
    new_run,
    write_release,
    write_resume,
    write_steps,
)

from tinyllama import files
from tinyllama.errors import InputError
from tinyllama.files import write_json
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking import follow as follow_module
from tinyllama.tracking.follow import RunFollower, is_shown


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def follower(run: RunDir, sink: RecordingSink) -> RunFollower:
    return follow(run, sink)


def test_restarted_followers_show_each_step_and_event_once(run: RunDir, log: RunLog, sink: RecordingSink) -> None:
    for first in (1, 11, 21):
        write_steps(log, first, first + 9)
        follow(run, sink).poll()
        log.event("checkpoint", first + 9, seconds=1.0)
        follower = follow(run, sink)
        follower.poll()
        follower.poll()
    assert sink.steps == list(range(1, 31))
    assert sink.events == ["start", "checkpoint", "checkpoint", "checkpoint"]


def test_steps_repeated_after_a_kill_are_not_shown_again(
    log: RunLog, sink: RecordingSink, follower: RunFollower
) -> None:
    write_steps(log, 1, 25)
    follower.poll()
    write_resume(log, 20)
    write_steps(log, 21, 23)
    follower.poll()
    write_steps(log, 24, 30)
    follower.poll()
    assert sink.steps == list(range(1, 31))
    assert sink.rewound_to == []


@pytest.mark.parametrize("rewinds", ["to step", "to start", "never"])
def test_numbers_after_a_rollback_replace_the_old_ones(run: RunDir, log: RunLog, rewinds: str) -> None:
    sink = RecordingSink(rewinds)
    follower = follow(run, sink)
    write_steps(log, 1, 25)
    follower.poll()
    log.event("rollback", 26, reason="spike", checkpoint=20, skipped_batches=[24, 25])
    follower.poll()  # the old rows are still there
    assert sink.steps == list(range(1, 26))
    write_resume(log, 20)
    write_steps(log, 21, 30, change=0.5)
    follower.poll()
    assert sink.steps == list(range(1, 31))
    assert sink.metrics[22]["loss"] == 1 + 8 / 23 + (0.0 if rewinds == "never" else 0.5)
    assert sink.metrics[27]["loss"] == 1 + 8 / 28 + 0.5
    assert sink.events == ["start", "rollback", "resume"]
    assert sink.rewound_to == [20]


def test_a_changed_recipe_and_a_restart_from_scratch_replace_the_old_numbers(
    log: RunLog, sink: RecordingSink, follower: RunFollower
) -> None:
    write_steps(log, 1, 25)
    follower.poll()
    write_resume(log, 20, changed=["train.optimizer.learning_rate was 1, is 2"])
    write_steps(log, 21, 24, change=0.5)
    follower.poll()
    assert (sink.steps, sink.metrics[20]["loss"]) == (list(range(1, 25)), 1 + 8 / 21 + 0.5)
    log.truncate_after(0)
    log.event("start", 0, ranks=1)
    write_steps(log, 1, 3, change=0.25)
    follower.poll()
    assert [row["loss"] for row in sink.metrics] == [9.25, 5.25, 1 + 8 / 3 + 0.25]


def test_an_incomplete_line_is_read_once_complete(
    run: RunDir, log: RunLog, sink: RecordingSink, follower: RunFollower
) -> None:
    write_steps(log, 1, 3)
    content = run.metrics_path.read_bytes()
    run.metrics_path.write_bytes(content[:-20])
    follower.poll()
    assert sink.steps == [1, 2]
    run.metrics_path.write_bytes(content)
    follower.poll()
    assert sink.steps == [1, 2, 3]


def test_metrics_truncated_and_grown_between_two_polls_are_complete(
    log: RunLog, sink: RecordingSink, follower: RunFollower
) -> None:
    write_steps(log, 1, 25)
    follower.poll()
    log.truncate_after(20)  # its event is not written yet
    write_steps(log, 21, 40, batch=1234567)
    follower.poll()
    assert sink.steps == list(range(1, 41))


def test_long_runs_are_downsampled_but_keep_validations_and_skipped_steps(
    run: RunDir, log: RunLog, sink: RecordingSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "FULL_RESOLUTION_STEPS", 16)
    monkeypatch.setattr(files, "_CHUNK_BYTES", 1000)
    write_steps(log, 1, 50)
    write_steps(log, 51, 51, validation_loss=2.0)
    write_steps(log, 52, 52)
    write_steps(log, 53, 53, loss=None, skipped="loss nan")
    write_steps(log, 54, 54)
    write_steps(log, 55, 55, **{"evaluation/piqa/acc": 0.5})
    write_steps(log, 56, 64)
    follow(run, sink).poll()
    assert sink.steps == [*range(1, 17), *range(18, 33, 2), *range(36, 51, 4), 51, 52, 53, 55, 56, 60, 64]
    assert "loss" not in sink.metrics[-5]
    assert sink.metrics[-4]["evaluation/piqa/acc"] == 0.5


def test_a_million_steps_give_tens_of_thousands_of_rows() -> None:
    shown = sum(is_shown({"step": number}) for number in range(1, 1_430_001))
    assert 40_000 < shown < 50_000
    assert all(is_shown({"step": number}) for number in range(1, 10_001))


def test_times_increase_and_follow_the_speed_between_events(tmp_path: Path) -> None:
    run, log = new_run(tmp_path)  # the speed gives 1 second per step
    sink = RecordingSink()
    write_steps(log, 1, 3)
    log.event("checkpoint", 3, seconds=0.0)
    write_resume(log, 3)
    write_steps(log, 4, 5)
    follow(run, sink).poll()
    assert sink.times == [1_700_000_000 + seconds for seconds in range(1, 6)]


def test_scores_are_shown_when_they_appear_and_when_they_change(
    run: RunDir, log: RunLog, sink: RecordingSink, follower: RunFollower
) -> None:
    write_steps(log, 1, 20)
    follower.poll()
    assert (sink.scores, sink.baselines) == ([], {})
    published = [
        {"name": "Big step 1k", "hellaswag": 50.0, "source": "published, a card"},
        {"name": "Big step 2k", "hellaswag": 60.0, "source": "published, a card"},
        {"name": "here", "hellaswag": 55.0, "source": "measured"},
    ]
    write_release(run, 10, 30.0, published)
    write_json(run.releases.baseline_path("here"), evaluation("models/here", None, 55.0))
    follower.poll()
    follower.poll()
    follow(run, sink).poll()
    assert sink.scores == [score_row(10, 30.0)]
    assert sink.baselines == {
        "models/here": {"scores/boolq acc": 50.0, "scores/hellaswag acc_norm": pytest.approx(55.0)},
        "Big (published)": {"scores/hellaswag acc_norm": 60.0},
    }
    write_release(run, 10, 31.5, published)
    write_release(run, 20, 33.0, published)
    follower.poll()
    assert sink.scores == [score_row(10, 31.5), score_row(20, 33.0)]
    assert sink.steps == list(range(1, 21))


def score_row(step: int, points: float) -> dict[str, Any]:
    scores = {"scores/hellaswag acc_norm": pytest.approx(points), "scores/boolq acc": 50.0}
    return {"step": step, "tokens": step * BATCH_TOKENS, **scores}


@pytest.mark.parametrize("line", [b'{"loss": 3.0}\n', b"\x00\x00\n", b"[1]\n"])
@pytest.mark.parametrize("number", [3, 40_000])
def test_a_damaged_line_is_reported_with_its_number(run: RunDir, log: RunLog, line: bytes, number: int) -> None:
    write_steps(log, 1, 1)
    rows = run.metrics_path.read_bytes() * (number - 1)
    run.metrics_path.write_bytes(rows + line + rows[:1000])
    with pytest.raises(InputError, match=rf"metrics\.jsonl:{number}: "):
        follow(run, RecordingSink()).poll()
