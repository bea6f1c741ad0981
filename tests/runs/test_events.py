"""Events by what they mean to a reader, and as text."""

import pytest

from tinyllama.runs.events import INFO, PROBLEM, describe_event, event_category


@pytest.mark.parametrize("name", ["release-failed", "checkpoint-damaged", "rank-lost", "tracker-blocked", "failed"])
def test_failures_are_problems(name: str) -> None:
    assert event_category({"event": name}) == PROBLEM
    assert event_category({"event": "checkpoint"}) == INFO


def test_description_has_units() -> None:
    checkpoint = {"time": 1.0, "event": "checkpoint", "step": 3, "seconds": 75.2, "stall_seconds": 0.017}
    assert describe_event(checkpoint) == "took 1 min 15 s; stall 0.017 s"
    rollback = {"time": 1.0, "event": "rollback", "step": 9, "reason": "loss nan", "skipped_batches": [7, 8]}
    assert describe_event(rollback) == "loss nan; skipped batches: 7, 8"
