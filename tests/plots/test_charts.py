"""The loss plot shows every step."""

import math
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from tinyllama.plots.charts import loss_plot


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
