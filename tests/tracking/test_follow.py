"""A follower shows what a run's files say, each thing once, however often it or training begins again."""

from pathlib import Path
from typing import Any

import pytest
from tests.tracking.recorded import BATCH_TOKENS, Recorded, evaluation, follower, new_run, release, resume, step

from tinyllama.errors import InputError
from tinyllama.files import write_json
from tinyllama.runs import jsonl
from tinyllama.tracking import follow
from tinyllama.tracking.follow import is_shown


def steps(sink: Recorded) -> list[int]:
    return [row["step"] for row in sink.shown]


def test_each_step_and_event_is_shown_once_by_followers_that_come_and_go(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    sink = Recorded()
    for first in (1, 11, 21):
        step(journal, first, first + 9)
        follower(run, sink).poll()
        journal.event("checkpoint", first + 9, seconds=1.0)
        again = follower(run, sink)
        again.poll()
        again.poll()
    assert steps(sink) == list(range(1, 31))
    assert sink.happened == ["start", "checkpoint", "checkpoint", "checkpoint"]
    assert sink.losses == (1 + 8 / 30, 9.0)


def test_steps_that_are_done_again_after_a_kill_are_not_shown_again(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    sink = Recorded()
    following = follower(run, sink)
    step(journal, 1, 25)
    following.poll()
    resume(journal, 20)
    step(journal, 21, 23)
    following.poll()
    step(journal, 24, 30)
    following.poll()
    assert steps(sink) == list(range(1, 31))
    assert sink.went_back == []


@pytest.mark.parametrize("goes_back", ["to the step", "to the beginning"])
def test_after_a_rollback_the_new_numbers_take_the_place_of_the_old(tmp_path: Path, goes_back: str) -> None:
    run, journal = new_run(tmp_path)
    sink = Recorded(goes_back)
    following = follower(run, sink)
    step(journal, 1, 25)
    following.poll()
    journal.event("rollback", 26, reason="spike", checkpoint=20, skipped_batches=[24, 25])
    following.poll()  # the old rows are still there
    assert steps(sink) == list(range(1, 26))
    resume(journal, 20)
    step(journal, 21, 30, change=0.5)
    following.poll()
    assert steps(sink) == list(range(1, 31))
    assert sink.shown[22]["loss"] == 1 + 8 / 23 + 0.5
    assert sink.happened == ["start", "rollback", "resume"]
    assert sink.went_back == [20]


def test_a_sink_that_cannot_forget_keeps_what_it_has_and_goes_on_behind_it(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    sink = Recorded("not at all")
    following = follower(run, sink)
    step(journal, 1, 25)
    following.poll()
    journal.event("rollback", 26, reason="spike", checkpoint=20, skipped_batches=[24, 25])
    resume(journal, 20)
    step(journal, 21, 30, change=0.5)
    following.poll()
    assert steps(sink) == list(range(1, 31))
    assert [sink.shown[22]["loss"], sink.shown[27]["loss"]] == [1 + 8 / 23, 1 + 8 / 28 + 0.5]


def test_a_run_that_goes_on_with_another_recipe_or_begins_anew_is_shown_anew_from_there(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    sink = Recorded()
    following = follower(run, sink)
    step(journal, 1, 25)
    following.poll()
    resume(journal, 20, changed=["train.optimizer.learning_rate was 1, is 2"])
    step(journal, 21, 24, change=0.5)
    following.poll()
    assert (steps(sink), sink.shown[20]["loss"]) == (list(range(1, 25)), 1 + 8 / 21 + 0.5)
    journal.truncate_after(0)
    journal.event("start", 0, ranks=1)
    step(journal, 1, 3, change=0.25)
    following.poll()
    assert [row["loss"] for row in sink.shown] == [9.25, 5.25, 1 + 8 / 3 + 0.25]


def test_a_line_that_is_half_written_waits_for_its_other_half(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    sink = Recorded()
    following = follower(run, sink)
    step(journal, 1, 3)
    whole = journal.run.metrics_path.read_bytes()
    journal.run.metrics_path.write_bytes(whole[:-20])
    following.poll()
    assert steps(sink) == [1, 2]
    journal.run.metrics_path.write_bytes(whole)
    following.poll()
    assert steps(sink) == [1, 2, 3]


def test_metrics_that_were_cut_and_grew_again_between_two_looks_are_read_from_where_they_are(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    sink = Recorded()
    following = follower(run, sink)
    step(journal, 1, 25)
    following.poll()
    journal.truncate_after(20)  # and its event is not yet there
    step(journal, 21, 40, batch=1234567)
    following.poll()
    assert steps(sink) == list(range(1, 41))


def test_a_long_run_is_thinned_the_more_the_longer_it_is_but_never_loses_a_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "FULL_RESOLUTION_STEPS", 16)
    monkeypatch.setattr(jsonl, "_CHUNK_BYTES", 1000)
    run, journal = new_run(tmp_path)
    sink = Recorded()
    step(journal, 1, 50)
    step(journal, 51, 51, validation_loss=2.0)
    step(journal, 52, 52)
    step(journal, 53, 53, loss=None, skipped="loss nan")
    step(journal, 54, 64)
    follower(run, sink).poll()
    assert steps(sink) == [*range(1, 17), *range(18, 33, 2), *range(36, 51, 4), 51, 52, 53, 56, 60, 64]
    assert "loss" not in sink.shown[-4]


def test_a_run_of_a_million_steps_has_tens_of_thousands_of_rows() -> None:
    shown = sum(is_shown({"step": number}) for number in range(1, 1_430_001))
    assert 40_000 < shown < 50_000
    assert all(is_shown({"step": number}) for number in range(1, 10_001))


def test_times_never_go_back_and_follow_the_speed_between_what_the_events_tell(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)  # 1 second a step, by its speed; an event each second of its clock
    sink = Recorded()
    step(journal, 1, 3)
    journal.event("checkpoint", 3, seconds=0.0)
    resume(journal, 3)
    step(journal, 4, 5)
    follower(run, sink).poll()
    began = 1_700_000_000
    assert sink.times == [began + 1, began + 2, began + 3, began + 4, began + 5]


def test_scores_appear_when_they_are_there_and_again_when_they_change(tmp_path: Path) -> None:
    run, journal = new_run(tmp_path)
    sink = Recorded()
    following = follower(run, sink)
    step(journal, 1, 20)
    following.poll()
    assert (sink.scored, sink.beside) == ([], {})
    published = [
        {"name": "Big step 1k", "hellaswag": 50.0, "source": "published, a card"},
        {"name": "Big step 2k", "hellaswag": 60.0, "source": "published, a card"},
        {"name": "here", "hellaswag": 55.0, "source": "measured"},
    ]
    release(run, 10, 30.0, published)
    write_json(run / "releases/baselines/here.json", evaluation("models/here", None, 55.0))
    following.poll()
    following.poll()
    follower(run, sink).poll()
    assert sink.scored == [scored(10, 30.0)]
    assert sink.beside == {
        "models/here": {"scores/boolq acc": 50.0, "scores/hellaswag acc_norm": pytest.approx(55.0)},
        "Big (published)": {"scores/hellaswag acc_norm": 60.0},
    }
    release(run, 10, 31.5, published)
    release(run, 20, 33.0, published)
    following.poll()
    assert sink.scored == [scored(10, 31.5), scored(20, 33.0)]
    assert steps(sink) == list(range(1, 21))


def scored(step: int, points: float) -> dict[str, Any]:
    scores = {"scores/hellaswag acc_norm": pytest.approx(points), "scores/boolq acc": 50.0}
    return {"step": step, "tokens": step * BATCH_TOKENS, **scores}


@pytest.mark.parametrize("line", [b'{"loss": 3.0}\n', b"\x00\x00\n", b"[1]\n"])
@pytest.mark.parametrize("place", [3, 40_000])
def test_a_damaged_line_is_named_with_its_number_wherever_it_lies(tmp_path: Path, line: bytes, place: int) -> None:
    run, journal = new_run(tmp_path)
    step(journal, 1, 1)
    rows = journal.run.metrics_path.read_bytes() * (place - 1)
    journal.run.metrics_path.write_bytes(rows + line + rows[:1000])
    with pytest.raises(InputError, match=rf"metrics.jsonl:{place}: not a row .*; correct or delete the line"):
        follower(run, Recorded()).poll()
