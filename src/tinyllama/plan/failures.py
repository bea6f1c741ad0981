"""What interruptions cost, and how often to save."""

import math
from dataclasses import dataclass

GPU_HOURS_BETWEEN_FAILURES = 50_676.0  # 54 x 24 x 16,384 / 419
"""Of one GPU: 419 unexpected interruptions in 54 days on 16,384 H100s (Llama Team 2024, arXiv:2407.21783, 3.3.4)."""

_NEVER_FINISHES_EXPONENT = 50.0
"""Times between failures that have to pass without one: it would take the age of the universe."""


@dataclass(frozen=True)
class FailureOverhead:
    """Of a whole run, in wall-clock time."""

    expected_failures: float
    lost_hours: float
    """Work done again, restarts, and standing still for checkpoints, at the recipe's interval."""
    best_interval_seconds: float
    lost_hours_at_best: float


def failure_overhead(
    run_hours: float, gpus: int, interval_seconds: float, stall_seconds: float, write_seconds: float,
    gpu_hours_between_failures: float, restart_seconds: float,
) -> FailureOverhead:  # fmt: skip
    """A run's expected losses, where it saves each `interval_seconds` and stands still `stall_seconds` each time.

    The time that a run takes with failures is Daly's (2006, doi:10.1016/j.future.2004.11.016, equation 13); infinite
    where it saves so seldom that it never ends. The best interval is sqrt(2 stall x time between failures) (Young 1974,
    doi:10.1145/361147.361115), no shorter than a checkpoint takes to be written and no longer than the run.
    """
    between_seconds = 3600 * gpu_hours_between_failures / gpus
    best = max(math.sqrt(2 * stall_seconds * between_seconds), write_seconds)
    best = min(best, 3600 * run_hours)

    def lost(interval: float) -> float:
        interval = min(interval, 3600 * run_hours)
        exponent = (interval + stall_seconds) / between_seconds
        if exponent + restart_seconds / between_seconds > _NEVER_FINISHES_EXPONENT:
            return math.inf
        taken = between_seconds / interval * math.exp(restart_seconds / between_seconds) * math.expm1(exponent)
        return run_hours * (taken - 1)

    return FailureOverhead(3600 * run_hours / between_seconds, lost(interval_seconds), best, lost(best))
