"""The overhead of failures, by Daly's and Young's formulas."""

import pytest

from tinyllama.plan.speed import failure_overhead


def test_best_interval_minimizes_lost_time() -> None:
    def lost(interval: float) -> float:
        return failure_overhead(1000, 512, interval, 30, 10, 50_000, 300).lost_hours

    best = failure_overhead(1000, 512, 3600, 30, 10, 50_000, 300)
    assert lost(3600) == pytest.approx(best.expected_failures * (1800 + 300) / 3600 + 1000 * 30 / 3600, rel=0.03)
    assert best.expected_failures == pytest.approx(1000 * 512 / 50_000)
    assert best.lost_hours_at_best == pytest.approx(lost(best.best_interval_seconds))
    assert best.lost_hours_at_best < min(lost(0.7 * best.best_interval_seconds), lost(1.4 * best.best_interval_seconds))
