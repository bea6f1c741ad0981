"""The loss plot shows every step, and annotations show every event."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from tinyllama.plots.charts import annotations, loss_plot
from tinyllama.runs.log import INFO, INTERRUPTION, PROBLEM, RELEASE, event_category

NAMES = ("skip", "rollback", "resume", "release", "checkpoint")


def events_of(steps: dict[str, list[int]]) -> list[dict[str, Any]]:
    return [{"event": name, "step": step} for name in steps for step in steps[name]]


def top_of_curve(path: Path) -> int:
    """Return the topmost row with blue pixels, between the middle of the plot and its legend."""
    pixels = imread(path)[:, 900:1120]
    return int(np.argmax((pixels[:, :, 2] - pixels[:, :, 0] > 0.15).any(axis=1)))


def test_spike_of_one_step_in_200_000_is_visible(tmp_path: Path) -> None:
    rows = [{"tokens": 2e6 * step, "loss": 9.0 if step < 10 else 3.0} for step in range(1, 200_001)]
    loss_plot(rows, tmp_path / "flat.png")
    rows[129_999]["loss"] = 8.0
    loss_plot(rows, tmp_path / "spike.png")
    assert top_of_curve(tmp_path / "spike.png") < top_of_curve(tmp_path / "flat.png") - 300


def test_values_that_are_not_finite_are_skipped(tmp_path: Path) -> None:
    rows = [{"tokens": 1000.0 * step, "loss": 5.0 - step / 100} for step in range(1, 101)]
    loss_plot(rows, tmp_path / "plain.png")
    rows.insert(50, {"tokens": 50_500.0, "loss": math.nan})
    rows.insert(60, {"tokens": 59_500.0, "loss": math.inf})
    loss_plot(rows, tmp_path / "holes.png")
    assert np.array_equal(imread(tmp_path / "plain.png"), imread(tmp_path / "holes.png"))


def test_run_of_one_step_has_a_plot(tmp_path: Path) -> None:
    loss_plot([{"tokens": 384.0, "loss": 6.4, "validation_loss": 6.3}], tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape[:2] == (900, 1600)


@given(st.dictionaries(st.sampled_from(NAMES), st.lists(st.integers(0, 1000), max_size=40)), st.integers(1, 4000))
def test_annotations_are_apart_and_count_every_event(steps: dict[str, list[int]], min_distance: int) -> None:
    events = events_of(steps)
    found = annotations(events, 8, min_distance)
    assert sum(annotation.count for annotation in found) == sum(event_category(event) != INFO for event in events)
    for category in (PROBLEM, INTERRUPTION, RELEASE):
        places = [annotation.tokens for annotation in found if annotation.category == category]
        assert places == sorted(places)
        assert len(places) <= 1 + 8000 // min_distance


@pytest.mark.parametrize(
    ("steps", "label"),
    [
        ({"skip": [5]}, "skip"),
        ({"skip": [5, 6, 7]}, "3 skips"),
        ({"skip": [5], "rollback": [7]}, "2 events"),
        ({"signal": [5, 9], "resume": [5, 9]}, "2 resumes"),
    ],
)
def test_annotation_label(steps: dict[str, list[int]], label: str) -> None:
    (annotation,) = annotations(events_of(steps), 1, 100)
    assert annotation.label == label
