"""Charts of a report: marks show every event, and every value is inside the axes."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama.plots.curves import summarize_metrics
from tinyllama.report.chart import NARROW, WIDE, Chart, Series, Unit
from tinyllama.report.marks import marks_of
from tinyllama.runs.log import INFO, INTERRUPTION, PROBLEM, RELEASE, event_category

NAMES = ("skip", "rollback", "resume", "release", "checkpoint")


def events_of(steps: dict[str, list[int]]) -> list[dict[str, Any]]:
    return [{"event": name, "step": step, "reason": "why"} for name in steps for step in steps[name]]


def loss_chart(losses: list[float], **more: Any) -> Chart:
    rows = [{"step": step, "tokens": 8 * step, "loss": loss} for step, loss in enumerate(losses, 1)]
    series = [Series("training", "training", summarize_metrics(rows).curves["loss"])]
    return Chart("loss", "Loss", "", Unit("nats per token"), series, sizes=(WIDE, NARROW), **more)


@given(st.dictionaries(st.sampled_from(NAMES), st.lists(st.integers(0, 1000), max_size=40)), st.integers(1, 4000))
def test_marks_are_apart_and_count_every_event(steps: dict[str, list[int]], min_distance: int) -> None:
    events = events_of(steps)
    found = marks_of(events, 8, min_distance)
    assert sum(mark.count for mark in found) == sum(event_category(event) != INFO for event in events)
    for category in (PROBLEM, INTERRUPTION, RELEASE):
        places = [mark.tokens for mark in found if mark.category == category]
        assert places == sorted(places)
        assert len(places) <= 1 + 8000 // min_distance


@pytest.mark.parametrize(
    ("steps", "label", "text"),
    [
        ({"skip": [5]}, "skip", "skip at step 5: why"),
        ({"skip": [5, 6, 7]}, "3 skips", "skip at step 5: why\nskip at step 6: why\nskip at step 7: why"),
        ({"skip": list(range(9))}, "9 skips", "skip at step 5: why\nand 3 more"),
        ({"skip": [5], "rollback": [7]}, "2 events", "skip at step 5: why\nrollback at step 7: why"),
        ({"signal": [5, 9], "resume": [5, 9]}, "2 resumes", "signal at step 5: why\nresume at step 5: why"),
    ],
)
def test_mark_has_a_label_and_the_words_of_its_events(steps: dict[str, list[int]], label: str, text: str) -> None:
    (mark,) = marks_of(events_of(steps), 1, 100)
    assert mark.label == label
    assert text in mark.text


_VALUES = st.floats(-1e30, 1e30).filter(lambda value: value == 0 or abs(value) > 1e-30)


@given(st.lists(_VALUES, min_size=1, max_size=300), st.sampled_from(["number", "percent", "bytes"]))
def test_values_ticks_and_marks_are_inside_the_axes(values: list[float], unit_format: Any) -> None:
    rows = [{"step": step, "tokens": 8 * step, "loss": value} for step, value in enumerate(values, 1)]
    series = [Series("x", "training", summarize_metrics(rows).curves["loss"], "line")]
    events = events_of({"skip": [1, len(values)], "release": [len(values) + 9]})
    chart = Chart("x", "X", "", Unit("unit", unit_format), series, events=events, batch_tokens=8, sizes=(WIDE, NARROW))
    for drawing in chart.drawings:
        assert [axis.kind for axis in drawing.axes] == (["linear", "log"] if max(values) > 0 else ["linear"])
        for axis in drawing.axes:
            (shape,) = axis.shapes
            for path in (shape.band, shape.line):
                places = np.array([float(number) for number in path[1:].split()]).reshape(-1, 2)
                assert (places[:, 0] >= drawing.left - 0.1).all() and (places[:, 0] <= drawing.right + 0.1).all()
                assert (places[:, 1] >= drawing.top - 0.1).all() and (places[:, 1] <= drawing.bottom + 0.1).all()
            assert all(drawing.top - 0.1 <= tick.position <= drawing.bottom + 0.1 for tick in axis.ticks)
        assert all(drawing.left <= place.x <= drawing.right for place in drawing.marks)
    assert json.loads(chart.values)["series"][0]["x"][-1] == 8 * len(values)


def test_spike_of_one_step_in_200_000_reaches_the_top() -> None:
    losses = [9.0 if step < 10 else 3.0 for step in range(200_000)]
    losses[130_000] = 8.9
    (linear, logarithmic), *_ = (drawing.axes for drawing in loss_chart(losses).drawings)
    for axis in (linear, logarithmic):
        places = np.array([float(number) for number in axis.shapes[0].band[1:].split()]).reshape(-1, 2)
        spikes = places[(places[:, 1] < 80) & (places[:, 0] > 300)]
        assert len(spikes) == 1


def test_logarithmic_axis_has_equal_distances_for_equal_factors() -> None:
    axis = next(axis for axis in loss_chart([1000.0, 100.0, 10.0, 1.0]).drawings[0].axes if axis.kind == "log")
    places = {tick.label: tick.position for tick in axis.ticks}
    distances = np.diff([places[label] for label in ("1", "10", "100", "1000")])
    assert np.allclose(distances, distances[0])


def test_chance_level_is_inside_and_far_baselines_are_labels_above_the_axes() -> None:
    baselines = {"near": 31.5, "far": 60.0, "further": 75.0, "below": 3.0}
    chart = loss_chart([30.0, 31.0, 32.0], baselines=baselines, chance=25.0)
    assert [(level.label, level.value) for level in chart.levels] == [("near", 31.5), ("random choice", 25.0)]
    for drawing in chart.drawings:
        for axis in drawing.axes:
            near, chance = (place for place, _ in axis.levels)
            assert drawing.top < near < chance < drawing.bottom
        found = sorted((arrow.position, arrow.label) for arrow in drawing.arrows)
        assert [label for _, label in found] == ["↑ further: 75", "↑ far: 60", "↓ below: 3"]
        assert all(10 < place < drawing.top - 20 for place, _ in found)


def test_far_baselines_do_not_flatten_the_scores() -> None:
    for baselines in (dict[str, float](), {"far": 59.2}):
        axis = loss_chart([26.0, 30.0], baselines=baselines, chance=25.0).drawings[0].axes[0]
        places = [float(number) for number in axis.shapes[0].band[1:].split()[1::2]]
        assert max(places) - min(places) > 200  # pixels of about 340
