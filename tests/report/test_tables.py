"""Lists of events are bounded, and show what matters first."""

from typing import Any

from tinyllama.report.tables import MAX_EVENTS, MAX_NOTABLE_EVENTS, events_to_list, select_notable_events


def events_of(steps: dict[str, list[int]]) -> list[dict[str, Any]]:
    found = [{"time": float(step), "event": name, "step": step} for name in steps for step in steps[name]]
    return sorted(found, key=lambda event: event["step"])


def test_rare_problems_are_selected_first() -> None:
    many = events_of({"checkpoint": list(range(500)), "skip": list(range(300)), "resume": [3, 4], "rollback": [250]})
    assert [event["event"] for event in select_notable_events(many)] == ["resume", "resume", "rollback"]
    skips = events_of({"skip": list(range(300)), "release": [7]})
    assert [event["step"] for event in select_notable_events(skips)] == [*range(300 - MAX_NOTABLE_EVENTS, 300)]


def test_complete_list_of_events_is_bounded() -> None:
    few = events_of({"checkpoint": list(range(30))})
    assert events_to_list(few) == ("All 30 events", few)
    title, found = events_to_list(events_of({"checkpoint": list(range(2000)), "skip": [5, 6]}))
    assert (title, len(found)) == ("All 2 events except checkpoints", 2)
    title, found = events_to_list(events_of({"skip": list(range(2000))}))
    assert "2,000" in title
    assert (found[0]["step"], len(found)) == (1000, MAX_EVENTS)
