"""Marks tell all events apart by what they mean, and never crowd a picture."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama.report.marks import marks_of
from tinyllama.report.tables import FEW_EVENTS, MOST_EVENTS, events_to_list, select_notable_events
from tinyllama.runs.events import INFO, INTERRUPTION, PROBLEM, RELEASE, describe_event, event_category

NAMES = ("skip", "rollback", "resume", "release", "checkpoint")


def events_of(steps: dict[str, list[int]]) -> list[dict[str, Any]]:
    found = [{"time": float(step), "event": name, "step": step} for name in steps for step in steps[name]]
    return sorted(found, key=lambda event: event["step"])


@given(st.dictionaries(st.sampled_from(NAMES), st.lists(st.integers(0, 1000), max_size=40)), st.integers(1, 4000))
def test_marks_of_a_kind_stand_apart_and_count_every_event(steps: dict[str, list[int]], least_apart: int) -> None:
    events = events_of(steps)
    marks = marks_of(events, 8, least_apart)
    assert sum(mark.count for mark in marks) == sum(event_category(event) != INFO for event in events)
    for kind in (PROBLEM, INTERRUPTION, RELEASE):
        places = [mark.tokens for mark in marks if mark.kind == kind]
        assert places == sorted(places)
        assert len(places) <= 1 + 8000 // least_apart


@pytest.mark.parametrize(
    ("steps", "label"),
    [
        ({"skip": [5]}, "skip"),
        ({"skip": [5, 6, 7]}, "3 skips"),
        ({"skip": [5], "rollback": [7]}, "2 events"),
        ({"signal": [5, 9], "resume": [5, 9]}, "2 resumes"),
    ],
)
def test_a_mark_says_what_it_stands_for(steps: dict[str, list[int]], label: str) -> None:
    (mark,) = marks_of(events_of(steps), 1, 100)
    assert mark.label == label


@pytest.mark.parametrize("name", ["release-failed", "checkpoint-damaged", "rank-lost", "tracker-blocked", "failed"])
def test_what_went_wrong_is_told_from_what_is_routine(name: str) -> None:
    assert event_category({"event": name}) == PROBLEM
    assert event_category({"event": "checkpoint"}) == INFO


def test_an_event_is_told_with_units() -> None:
    event = {"time": 1.0, "event": "checkpoint", "step": 3, "seconds": 75.2, "stall_seconds": 0.017}
    assert describe_event(event) == "took 1 min 15 s; stall 0.017 s"
    back = {
        "time": 1.0,
        "event": "rollback",
        "step": 9,
        "reason": "loss nan",
        "checkpoint": 5,
        "skipped_batches": [7, 8],
    }
    assert describe_event(back) == "loss nan; checkpoint 5; skipped batches: 7, 8"


def test_of_many_events_the_rare_ones_that_went_wrong_come_first() -> None:
    many = events_of({"checkpoint": list(range(500)), "skip": list(range(300)), "resume": [3, 4], "rollback": [250]})
    assert [event["event"] for event in select_notable_events(many)] == ["resume", "resume", "rollback"]
    only_skips = events_of({"skip": list(range(300)), "release": [7]})
    assert [event["step"] for event in select_notable_events(only_skips)] == list(range(300 - FEW_EVENTS, 300))


def test_a_list_of_events_is_bounded_and_says_so() -> None:
    few = events_of({"checkpoint": list(range(30))})
    assert events_to_list(few) == ("All 30 events", few)
    words, found = events_to_list(events_of({"checkpoint": list(range(2000)), "skip": [5, 6]}))
    assert (words, len(found)) == ("All 2 events but checkpoints", 2)
    words, found = events_to_list(events_of({"skip": list(range(2000))}))
    assert words == "The newest 1,000 of 2,000 events, without checkpoints"
    assert (found[0]["step"], len(found)) == (1000, MOST_EVENTS)
