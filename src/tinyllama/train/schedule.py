"""The learning rate of a step: a pure function, no torch."""

import math

from tinyllama.recipe import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Learning rate of step `step` of `steps`, counted from 0.

    Rises linearly to `peak` over the warm-up. Then `cosine` falls along half a cosine to the final rate at the last
    step (Loshchilov and Hutter 2016, arXiv:1608.03983); `wsd` stays at the peak and falls linearly over the last
    `decay_fraction` of the steps (Hu et al. 2024, arXiv:2404.06395; linear as in Hägele et al. 2024, arXiv:2405.18392).
    """
    rising = peak * (step + 1) / schedule.warmup_steps if step < schedule.warmup_steps else peak
    last = steps - 1
    final = schedule.final_learning_rate
    if schedule.name == "cosine":
        if step < schedule.warmup_steps:
            return rising
        done = (step - schedule.warmup_steps) / max(1, last - schedule.warmup_steps)
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay_steps = max(1, round(schedule.decay_fraction * steps))
    # In a run so short that the decay begins within the warm-up, the lower of the two holds.
    return min(rising, final + (peak - final) * min(1.0, max(0.0, (last - step) / decay_steps)))
