"""The samples of a run: each sample of the current weights once."""

import json
from pathlib import Path
from typing import Any

import pytest

from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.runs.samples import current_samples, format_sample


def sample(step: int, greedy: str, prompt: str = "a") -> dict[str, Any]:
    return {"event": "sample", "step": step, "prompt": prompt, "greedy": greedy, "sampled": "x"}


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ([], [(10, "one"), (20, "two"), (30, "three")]),
        ([{"event": "resume", "step": 10}], [(10, "one"), (20, "two"), (30, "three")]),
        ([{"event": "resume", "step": 10}, sample(20, "2")], [(10, "one"), (20, "2"), (30, "three")]),
        ([{"event": "rollback", "step": 35, "checkpoint": 20}], [(10, "one"), (20, "two")]),
        ([{"event": "resume", "step": 10, "changed": ["seed"]}], [(10, "one")]),
        ([{"event": "start", "step": 0}, sample(10, "1")], [(10, "1")]),
    ],
    ids=["uninterrupted", "resumed", "resumed on other hardware", "rolled back", "recipe changed", "started again"],
)
def test_samples_are_those_of_the_current_weights(later: list[dict[str, Any]], expected: list[tuple[int, str]]) -> None:
    events = [{"event": "start", "step": 0}, sample(10, "one"), sample(20, "two"), sample(30, "three"), *later]
    assert [(event["step"], event["greedy"]) for event in current_samples(events)] == expected
    assert [event["step"] for event in current_samples(events, 15)] == [step for step, _ in expected if step <= 15]


def test_log_repeats_no_sample_and_has_the_samples_after_a_rollback(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    texts = [{"prompt": "a", "greedy": "b\n", "sampled": "c"}, {"prompt": "d", "greedy": "e", "sampled": "f"}]
    log = RunLog(run)
    log.samples(10, texts[:1])
    with run.events_path.open("ab") as file:
        file.write(b'not an event\n{"event": "sample", "prompt": "z"}\n{"event": "rollback", "step": 12}\n')
    log = RunLog(run)
    log.truncate_after(0)
    log.samples(10, texts)
    log.event("rollback", 12, checkpoint=5)
    log.truncate_after(5)
    log.samples(10, texts)
    rows = [json.loads(line) for line in run.events_path.read_text().splitlines() if line.startswith("{")]
    assert [row.get("prompt") for row in rows] == ["a", "z", None, "d", None, "a", "d"]


def test_long_samples_and_control_characters_fit_on_one_line() -> None:
    line = format_sample(1200, "a" * 9 + "b" * 32, "é\x1b[31m" + "é" * 60)
    assert line == 'step 1,200: "…' + "b" * 32 + r'" → "é\u001b[31m' + "é" * 42 + '…"'
    assert format_sample(1, "a", "b" + "\n" * 31 + "c") == r'step 1: "a" → "b\n⋮\nc"'
