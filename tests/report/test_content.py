"""Lists of events are bounded, and show what matters first."""

from typing import Any

from tinyllama.report import samples
from tinyllama.report.content import MAX_NOTABLE_EVENTS, select_notable_events


def events_of(steps: dict[str, list[int]]) -> list[dict[str, Any]]:
    found = [{"time": float(step), "event": name, "step": step} for name in steps for step in steps[name]]
    return sorted(found, key=lambda event: event["step"])


def test_rare_problems_are_selected_first() -> None:
    many = events_of({"checkpoint": list(range(500)), "skip": list(range(300)), "resume": [3, 4], "rollback": [250]})
    selected = [(event["event"], event["step"]) for event in select_notable_events(many)]
    newest_skips = [("skip", step) for step in range(301 - MAX_NOTABLE_EVENTS, 300)]
    assert selected == [("rollback", 250), *newest_skips]
    few = events_of({"checkpoint": list(range(500)), "resume": [3, 4], "rollback": [250]})
    assert [event["event"] for event in select_notable_events(few)] == ["resume", "resume", "rollback"]


def test_timeline_of_a_prompt_is_evenly_spaced_and_has_no_blank_lines() -> None:
    texts = ["\n\n\n\n", "a\n  \n \n\n b", "a\n\nb", *["same"] * 9]
    events = [{"event": "sample", "step": step, "prompt": "p", "greedy": text} for step, text in enumerate(texts)]
    (timeline,) = samples.timelines(events).values()
    rows = samples.table(timeline).rows
    assert [row[1] for row in rows[:3]] == ["⋮", "a\n⋮\n b", "a\n\nb"]
    assert {row[2] for row in rows} == {"\N{EN DASH}"}
    assert [event["step"] for event in samples.select(timeline)] == [0, 2, 4, 7, 9, 11]
