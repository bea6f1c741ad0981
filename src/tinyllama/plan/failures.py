"""What interruptions cost, and how often to save."""

import math
from dataclasses import dataclass

GPU_HOURS_BETWEEN_FAILURES = 54 * 24 * 16_384 / 419
"""Of one GPU: 419 unexpected interruptions in 54 days on 16,384 H100s (Llama Team 2024, arXiv:2407.21783, 3.3.4)."""


@dataclass(frozen=True)
class Losses:
    """Of a whole run."""

    expected_failures: float
    lost_hours: float
    """Of wall-clock time: work done again, restarts, and standing still for checkpoints, at the recipe's interval."""
    best_interval_seconds: float
    lost_hours_at_best: float


def losses(
    run_hours: float, gpus: int, interval_seconds: float, stall_seconds: float, write_seconds: float,
    gpu_hours_between_failures: float, restart_seconds: float,
) -> Losses:  # fmt: skip
    """A run's expected losses, where it saves each `interval_seconds` and stands still `stall_seconds` each time.

    A failure costs half an interval and a restart. The best interval is sqrt(2 stall x time between failures) (Young
    1974, doi:10.1145/361147.361115), and no shorter than a checkpoint takes to be written.
    """
    between_seconds = 3600 * gpu_hours_between_failures / gpus
    failures = 3600 * run_hours / between_seconds
    best = max(math.sqrt(2 * stall_seconds * between_seconds), write_seconds)

    def lost(interval: float) -> float:
        again = failures * (interval / 2 + restart_seconds)
        return again / 3600 + run_hours * stall_seconds / interval

    return Losses(failures, lost(interval_seconds), best, lost(best))
