"""The average of a run's last checkpoints, which can replace a learning-rate cooldown.

Checkpoints are verified and read one at a time, so memory holds one model and the average, both in float32. See LAWA
(Kaddour 2022, arXiv:2209.14981); benchmarks/averaging.py compares this method with the demo's cooldown.
"""

from collections.abc import Sequence

import torch

from tinyllama.errors import InputError
from tinyllama.model.llama import Llama
from tinyllama.runs.checkpoint import load_weights
from tinyllama.runs.run_dir import CheckpointDir


def averaged_checkpoints(checkpoint: CheckpointDir, count: int, exactly: bool = True) -> list[CheckpointDir]:
    """Return the `count` newest checkpoints of a run up to and including `checkpoint`, oldest first.

    Checkpoints before a gap of more than `checkpoint.every_steps` steps are excluded, because their weights are so old
    that the average would be worse than the newest checkpoint alone. If fewer than `count` checkpoints remain, return
    all remaining checkpoints, or raise InputError if `exactly` is true.
    """
    if count == 1:
        return [checkpoint]
    run = checkpoint.run
    candidates = [other for other in run.checkpoints() if other.step <= checkpoint.step]
    max_gap = run.recipe().checkpoint.every_steps
    chosen = candidates[-1:]
    for other in reversed(candidates[:-1]):
        if len(chosen) == count or chosen[0].step - other.step > max_gap:
            break
        chosen.insert(0, other)
    if len(chosen) < count and exactly:
        steps = ", ".join(str(other.step) for other in chosen)
        raise InputError(
            f"{run.path}: --average is {count}, but up to {checkpoint.name} there are {len(chosen)} checkpoints in a "
            f"row (of step {steps}); give at most {len(chosen)}, or raise checkpoint.keep for the rest of the run"
        )
    return chosen


def averaging_weights(count: int, decay: float) -> list[float]:
    """Return the weights of `count` checkpoints in their average, oldest first.

    Each weight is `decay` times the weight of the next checkpoint. The sum of the weights is 1.
    """
    weights = [decay**age for age in reversed(range(count))]
    return [weight / sum(weights) for weight in weights]


@torch.no_grad()
def load_average(model: Llama, checkpoints: Sequence[CheckpointDir], decay: float) -> None:
    """Load the weighted average of `checkpoints`, sorted oldest first, into `model`, which has the same shape.

    The weight of each checkpoint is `decay` times the weight of the next. A single checkpoint is loaded unchanged.
    Raises InputError if the checkpoints are from different runs. Raises InputError also if a checkpoint does not match
    its recorded hashes or the shapes of the model.
    """
    first, last = checkpoints[0], checkpoints[-1]
    if len({checkpoint.run for checkpoint in checkpoints}) != 1:
        raise InputError(f"{first.path}: not of the same run as {last.path}; average the checkpoints of one run")
    load_weights(last, model)
    if len(checkpoints) == 1:
        return
    *older, newest = averaging_weights(len(checkpoints), decay)
    average = {name: tensor * newest for name, tensor in model.state_dict().items()}
    for checkpoint, weight in zip(checkpoints[:-1], older, strict=True):
        load_weights(checkpoint, model)
        for name, tensor in model.state_dict().items():
            average[name].add_(tensor, alpha=weight)
    model.load_state_dict(average)
