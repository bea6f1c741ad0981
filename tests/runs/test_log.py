"""The list of events."""

from pathlib import Path

import pytest

import tinyllama
from tinyllama.runs.log import EVENT_KINDS, describe_event, event_category, event_text, event_title


def test_every_event_of_the_list_is_written_somewhere() -> None:
    code = "".join(path.read_text() for path in Path(tinyllama.__file__).parent.rglob("*.py"))
    assert [name for name in EVENT_KINDS if code.count(f'"{name}"') < 2] == []


@pytest.mark.parametrize(
    ("name", "category"),
    [("release-failed", "problem"), ("resume", "interruption"), ("checkpoint", "info"), ("of another version", "info")],
)
def test_events_have_a_category(name: str, category: str) -> None:
    assert event_category({"event": name}) == category


def test_details_of_an_event_have_units() -> None:
    event = {"time": 1.0, "event": "checkpoint", "step": 3000, "seconds": 75.2, "stall_seconds": 0.017, "ranks": None}
    assert (event_title(event), describe_event(event)) == (
        "checkpoint at step 3,000",
        "took 1 min 15 s; stall 0.017 s",
    )
    rollback = {"event": "rollback", "step": 9, "reason": "loss nan", "checkpoint": 5, "skipped_batches": [7, 8]}
    assert describe_event(rollback) == "loss nan; checkpoint 5; skipped batches: 7, 8"
    assert event_text(rollback) == "rollback at step 9: loss nan; checkpoint 5; skipped batches: 7, 8"
    assert event_text({"event": "done", "step": 9}) == "done at step 9"
