"""Warnings about settings of a recipe that do not fit the length of its run or its ranks.

`train` prints them before the first step, `plan` and `doctor` too. Imports torch only if a store is given.
"""

import math
from collections.abc import Iterator

from tinyllama.data.store import TokenStore
from tinyllama.prepare.holdout import how_to_hold_out
from tinyllama.recipe import Recipe
from tinyllama.train.schedule import learning_rate

_NEAR = 0.05
"""Fraction of the peak by which a learning rate may miss its target without a warning."""


def surprises(recipe: Recipe, ranks: int | None = None, store: TokenStore | None = None) -> list[str]:
    """Return the warnings as lines `place: problem; remedy`, as far as ranks and store are known."""
    found = [*_schedule(recipe), *_intervals(recipe), *_never_reached(recipe)]
    found += _batch(recipe, ranks) if ranks else ()
    return [*found, *(_held_out(recipe, store) if store else ())]


def _schedule(recipe: Recipe) -> Iterator[str]:
    """Yield a warning if the learning rate misses its peak or its final rate."""
    train, steps = recipe.train, recipe.train.steps
    schedule, peak, final = train.schedule, train.optimizer.learning_rate, train.schedule.final_learning_rate

    def rate(step: int) -> float:
        return learning_rate(schedule, peak, step, steps)

    rising = max(1, min(schedule.warmup_steps, steps))
    highest, last = rate(rising - 1), rate(steps - 1)
    if highest < peak * (1 - _NEAR):  # of wsd, the decay may begin within the warm-up
        highest = max(map(rate, range(rising)))
    if highest >= peak * (1 - _NEAR) and math.isclose(last, final, rel_tol=0, abs_tol=_NEAR * peak):
        return
    lower = " or decay_fraction" if schedule.name == "wsd" else ""
    yield (
        f"train.schedule: with {schedule.warmup_steps:,} warm-up steps in a run of {steps:,} the learning rate rises "
        f"to {highest:.3g} (the peak is {peak:g}) and ends at {last:.3g} (the final rate is {final:g}); "
        f"lower warmup_steps{lower}, or raise train.tokens"
    )


def _intervals(recipe: Recipe) -> Iterator[str]:
    """Yield a warning for each interval that is longer than the run."""
    steps = recipe.train.steps
    if (every := recipe.train.validate_every_steps) > steps:
        words = f"{every:,} is more than the run's {steps:,}, so only the last step is validated"
        yield f"train.validate_every_steps: {words}; lower it for a curve"
    before_last = _last_tokens(recipe) - recipe.train.batch_tokens
    has_milestone = any(
        tokens <= before_last for tokens in (*recipe.release.at_tokens, *filter(None, [recipe.release.every_tokens]))
    )
    if (every := recipe.checkpoint.every_steps) > steps and not has_milestone:
        words = f"{every:,} is more than the run's {steps:,}, so an interrupted run starts again from the beginning"
        yield f"checkpoint.every_steps: {words}; lower it"


def _never_reached(recipe: Recipe) -> Iterator[str]:
    """Yield a warning for each field with token counts beyond the last step."""
    last = _last_tokens(recipe)
    stages = [stage.from_tokens for stage in recipe.data.stages]
    wanted = {
        "release.at_tokens": recipe.release.at_tokens,
        "release.every_tokens": filter(None, [recipe.release.every_tokens]),
    }
    for field, counts in (wanted | {"data.stages": stages}).items():
        first, *others = sorted(count for count in counts if count > last) or [0]
        if first:
            also = f" and {len(others)} later ones" if others else ""
            words = f"{first:,} tokens{also} are never reached, the run ends at {last:,}"
            yield f"{field}: {words}; take that out, or raise train.tokens"


def _last_tokens(recipe: Recipe) -> int:
    return recipe.train.steps * recipe.train.batch_tokens


def _batch(recipe: Recipe, ranks: int) -> Iterator[str]:
    """Yield a warning if the rows of a rank have no divisor close to the micro-batch size."""
    train = recipe.train
    if train.batch_sequences % ranks:
        return  # which is refused elsewhere
    rows, most, at_a_time = (
        train.sequences_per_rank(ranks),
        train.micro_batch_sequences,
        train.effective_micro_batch_size(ranks),
    )
    if 2 * at_a_time <= min(rows, most):
        yield (
            f"train.micro_batch_sequences: {at_a_time} at a time, since the {rows} rows of a rank have no larger "
            f"divisor up to {most}; another train.batch_sequences would train faster"
        )


def _held_out(recipe: Recipe, store: TokenStore) -> Iterator[str]:
    """Yield a warning for each source with too little text to validate on."""
    from tinyllama.train.validation import sources_without_validation  # noqa: PLC0415 - brings torch, which `plan` does without

    for name in sources_without_validation(recipe, store):
        remedy = f"{how_to_hold_out(store, name)}, or shorten train.sequence_length"
        yield f"{recipe.data.store}/{name}: too little held out to validate on; {remedy}"
