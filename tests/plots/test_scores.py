"""The vertical axis of a plot of scores: near baselines are inside, far baselines do not flatten the scores."""

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from tinyllama.plots.charts import draw_scores, far_labels, readable_range, save_png

SCORES = st.floats(0, 100)


@given(SCORES, SCORES, st.lists(SCORES))
def test_every_level_is_inside_the_range_or_an_arrow(one: float, other: float, levels: list[float]) -> None:
    low, high = sorted((one, other))
    bounds = readable_range(low, high, levels)
    named = {str(number): level for number, level in enumerate(levels)}
    inside = [level for level in levels if bounds[0] <= level <= bounds[1]]
    assert len(far_labels(named, *bounds)) + len(inside) == len(levels)
    assert bounds[0] <= low <= high <= bounds[1]
    assert bounds[1] - bounds[0] <= 3.001 * (high - low)


def releases(scores: list[float], baselines: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
    rows = [
        {"name": "small", "tokens": 1000 * number, "hellaswag": score, "stderr": 0.5}
        for number, score in enumerate(scores, 1)
    ]
    published = [
        {"name": name, "tokens": 3e11, "hellaswag": score, "source": "published, its card"}
        for name, score in baselines.items()
    ]
    return {"releases": rows, "baselines": published}


def test_scores_chance_and_near_baselines_are_inside_the_axes() -> None:
    figure = Figure()
    draw_scores(figure, releases([26.0, 30.0], {"near": 33.0, "far": 59.2}), chance=25.0)
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert low < 25.0 and 33.0 < high < 40.0
    labels = [str(line.get_label()) for line in axes.get_lines()]
    assert "random choice: 25" in labels
    assert any(label.startswith("near") for label in labels) and not any(label.startswith("far") for label in labels)
    assert "↑ far after 300B tokens (published): 59.2" in axes.get_title(loc="right")


def test_labels_of_far_baselines_are_inside_the_picture(tmp_path: Path) -> None:
    far = {f"baseline {number}": 50.0 + number for number in range(5)}
    table = releases([26.0], far)
    save_png(lambda figure: draw_scores(figure, table, chance=25.0), tmp_path / "scores.png", "HellaSwag")
    pixels = imread(tmp_path / "scores.png")[:, :, :3]
    assert pixels.shape[:2] == (900, 1600)
    assert np.all(pixels[:5] == 1) and np.any(pixels[5:60] != 1)  # the text begins below a white edge
