"""The loss plot shows every step, however many there are."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tinyllama.formatting import format_count
from tinyllama.report.pictures import loss_plot


def top_of_curve(path: Path) -> int:
    """The topmost row of pixels that is blue, between the middle of the plot and its legend."""
    pixels = imread(path)[:, 900:1120]
    return int(np.argmax((pixels[:, :, 2] - pixels[:, :, 0] > 0.15).any(axis=1)))


def test_a_spike_of_one_step_in_200_000_is_seen(tmp_path: Path) -> None:
    rows = [{"tokens": 2e6 * step, "loss": 9.0 if step < 10 else 3.0} for step in range(1, 200_001)]
    loss_plot(rows, tmp_path / "flat.png")
    rows[129_999]["loss"] = 8.0
    loss_plot(rows, tmp_path / "spike.png")
    assert top_of_curve(tmp_path / "spike.png") < top_of_curve(tmp_path / "flat.png") - 300


def test_what_is_missing_or_not_finite_is_left_out(tmp_path: Path) -> None:
    rows = [{"tokens": 1000.0 * step, "loss": 5.0 - step / 100} for step in range(1, 101)]
    loss_plot(rows, tmp_path / "plain.png")
    rows.insert(50, {"tokens": 50_500.0, "loss": math.nan})
    rows.insert(60, {"tokens": 59_500.0, "loss": math.inf})
    loss_plot(rows, tmp_path / "holes.png")
    assert np.array_equal(imread(tmp_path / "plain.png"), imread(tmp_path / "holes.png"))
    rows[-1]["validation_loss"] = 4.0
    loss_plot(rows, tmp_path / "validated.png")
    assert not np.array_equal(imread(tmp_path / "plain.png"), imread(tmp_path / "validated.png"))


def test_a_run_of_one_step_has_a_plot(tmp_path: Path) -> None:
    loss_plot([{"tokens": 384.0, "loss": 6.4, "validation_loss": 6.3}], tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape[:2] == (900, 1600)


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0"), (384, "384"), (1000, "1K"), (999_999, "1M"), (6_012_345, "6.01M"), (105e9, "105B"), (1.5e12, "1.5T")],
)
def test_counts_read_as_people_say_them(count: float, words: str) -> None:
    assert format_count(count) == words
