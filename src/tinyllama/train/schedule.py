"""Learning-rate schedules: pure functions of the step, without torch, since `plan` and preflight use them."""

import math

from tinyllama.recipe import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Return the learning rate of step `step` of `steps`, counted from 0.

    The rate rises linearly to `peak` during the warm-up. `cosine` then follows half a cosine to the final rate at the
    last step (Loshchilov and Hutter 2016, arXiv:1608.03983). `wsd` stays at the peak and decays linearly over the last
    `decay_fraction` of the steps (Hu et al. 2024, arXiv:2404.06395; linear as in Hägele et al. 2024, arXiv:2405.18392).
    """
    final, last_step = schedule.final_learning_rate, steps - 1
    rate = peak * (step + 1) / schedule.warmup_steps if step < schedule.warmup_steps else peak
    if schedule.name == "cosine":
        if step < schedule.warmup_steps:
            return rate
        progress = (step - schedule.warmup_steps) / max(1, last_step - schedule.warmup_steps)
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_steps = max(1, round(schedule.decay_fraction * steps))
    # In a short run the decay may begin during the warm-up. The lower of the two rates then applies.
    return min(rate, final + (peak - final) * min(1.0, max(0.0, (last_step - step) / decay_steps)))
