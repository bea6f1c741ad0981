"""The mean of a run's last checkpoints, for a release: it stands in for a cool-down of the learning rate.

Reads checkpoints, each checked against its hashes, one at a time: a model's weights and their mean are in memory, both
float32. See LAWA (Kaddour 2022, arXiv:2209.14981); benchmarks/averaging.py measures it beside the demo's cool-down.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from tinyllama.errors import InputError
from tinyllama.model.llama import Llama
from tinyllama.recipe import Recipe
from tinyllama.runs.checkpoint import list_committed, load_weights, step_of


def averaged_checkpoints(run: Path, source: Path, count: int, exactly: bool = True) -> list[Path]:
    """The `count` newest checkpoints of a run up to `source`, which is one of them, oldest first.

    Where there are fewer, as at a run's beginning, or some between them were deleted (a mean with what the run was long
    before would be worse than no mean), those that there are, or if `exactly` so many are wanted, InputError.
    """
    if count == 1:
        return [source]
    there = [folder for folder in list_committed(run) if step_of(folder) <= step_of(source)]
    every = Recipe.load(run / "recipe.yaml").checkpoint.every_steps
    chosen = there[-1:]
    for folder in reversed(there[:-1]):
        if len(chosen) == count or step_of(chosen[0]) - step_of(folder) > every:
            break
        chosen.insert(0, folder)
    if len(chosen) < count and exactly:
        steps = ", ".join(str(step_of(folder)) for folder in chosen)
        raise InputError(
            f"{run}: --average is {count}, but up to {source.name} there are {len(chosen)} checkpoints in a row (of "
            f"step {steps}); give at most {len(chosen)}, or have the rest of the run keep more with checkpoint.keep"
        )
    return chosen


def averaging_weights(count: int, decay: float) -> list[float]:
    """The share of each of `count` checkpoints, oldest first, in their mean: each `decay` times that of the next."""
    weights = [decay**age for age in reversed(range(count))]
    return [weight / sum(weights) for weight in weights]


@torch.no_grad()
def average_into(model: Llama, folders: Sequence[Path], decay: float) -> None:
    """Put the mean of checkpoints' weights, oldest first, into a model of their shape; of one alone, its very bits.

    Each counts `decay` times as much as the one after it. Raises InputError where the checkpoints are not of one run,
    one does not match its hashes, or has other shapes.
    """
    if len({folder.parent for folder in folders}) != 1:
        raise InputError(f"{folders[0]}: of another run than {folders[-1]}; average the checkpoints of one run")
    load_weights(folders[-1], model)
    if len(folders) == 1:
        return
    *older, newest = averaging_weights(len(folders), decay)
    mean = {name: weight * newest for name, weight in model.state_dict().items()}
    for folder, share in zip(folders[:-1], older, strict=True):
        load_weights(folder, model)
        for name, weight in model.state_dict().items():
            mean[name].add_(weight, alpha=share)
    model.load_state_dict(mean)
