"""The overhead of failures, by Daly's and Young's formulas."""

import pytest

from tinyllama.plan.formulas import failure_overhead


def test_best_interval_minimizes_lost_time() -> None:
    def lost(interval: float) -> float:
        return failure_overhead(1000, 512, interval, 30, 10, 50_000, 300)["lost_hours"]

    found = failure_overhead(1000, 512, 3600, 30, 10, 50_000, 300)
    failures, best = found["expected_failures"], found["best_checkpoint_seconds"]
    assert lost(3600) == pytest.approx(failures * (1800 + 300) / 3600 + 1000 * 30 / 3600, rel=0.03)
    assert failures == pytest.approx(1000 * 512 / 50_000)
    assert found["lost_hours_at_best"] == pytest.approx(lost(best))
    assert found["lost_hours_at_best"] < min(lost(0.7 * best), lost(1.4 * best))
