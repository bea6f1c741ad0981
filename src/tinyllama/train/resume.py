"""Where a run goes on: its newest whole checkpoint, or its beginning.

The first rank looks and tells the others, so that all take the same one and a checkpoint is hashed once.
"""

from pathlib import Path
from typing import Any

from tinyllama import hardware
from tinyllama.data.batches import batch_index_for_step
from tinyllama.errors import InputError, RunStoppedError
from tinyllama.formatting import echo
from tinyllama.runs import checkpoint
from tinyllama.runs.log import RunLog
from tinyllama.train.distributed import broadcast_from_rank0
from tinyllama.train.guard import discard_stale_rollbacks, read_rollbacks, record_rollback
from tinyllama.train.setup import TrainState, initialize_weights


def resume(trainer: TrainState, journal: RunLog | None, allow_change: bool) -> tuple[int, dict[str, Any]]:
    """Put the newest whole checkpoint in place; return the step to go on with and the checkpoint's state.

    Without one, the weights get their first values: step 0, and no state. Raises InputError where another recipe made
    the checkpoint, unless `allow_change`.
    """
    folder = _agree_on_checkpoint(trainer, journal)
    if folder is None:
        initialize_weights(trainer)
        step, state, changed = 0, {}, []
    else:
        step, state = checkpoint.step_of(folder), checkpoint.read_state(folder)
        changed = _changes(trainer, state)
        _check_changes_allowed(changed, folder, allow_change)
        if step > trainer.recipe.train.steps:
            raise InputError(
                f"{folder}: the run is past train.tokens, {trainer.recipe.train.tokens:,}; give it more, or delete the "
                "checkpoints after that to train from there"
            )
        checkpoint.load(folder, trainer.model, trainer.optimizers)
    if journal:
        journal.truncate_after(step)
        details = {"ranks": trainer.ranks.count, "device": hardware.device_name(trainer.ranks.device)}
        details |= {"changed": changed} if changed else {}
        journal.event("resume" if folder else "start", step, **details)
    return step, state


def _agree_on_checkpoint(trainer: TrainState, journal: RunLog | None) -> Path | None:
    """The checkpoint to go on from, and in `trainer` the times that the run went back: what the first rank finds."""
    newest, went_back = None, []
    if journal:
        newest = _newest_valid_checkpoint(trainer.run, journal)
        if newest is None:
            discard_stale_rollbacks(trainer.run)
        went_back = read_rollbacks(trainer.run)
    newest, trainer.went_back = broadcast_from_rank0((newest, went_back), trainer.ranks)
    return newest


def _newest_valid_checkpoint(run: Path, journal: RunLog) -> Path | None:
    """The newest checkpoint whose hashes hold; the damaged ones after it are an event each, and deleted."""
    damaged: list[Path] = []
    for folder in reversed(checkpoint.list_committed(run)):
        damage = checkpoint.find_damage(folder)
        if not damage:
            break
        echo(f"{damage[0]}; looking for an older checkpoint", to_stderr=True)
        journal.event("checkpoint-damaged", checkpoint.step_of(folder), problem=damage[0])
        damaged.append(folder)
    else:
        if damaged:
            raise InputError(
                f"{run}: none of its checkpoints is whole ({damage[0]}); put the files back, or delete "
                f"{run / 'checkpoints'} to begin anew"
            )
        return None
    for other in damaged:  # their place among the newest belongs to what can be resumed from
        checkpoint.delete(other)
    return folder


_IMMUTABLE_FIELDS = (
    "model.",
    "tokenizer ",
    "train.optimizer.name ",
    "train.batch_sequences ",
    "train.sequence_length ",
)
"""What a checkpoint's tensors depend on, and what the numbers of its steps count."""


def _changes(trainer: TrainState, state: dict[str, Any]) -> list[str]:
    """What changes the weights and is not as it was when a checkpoint was made."""
    store, tokenizer = "data.store (its content)", "tokenizer (its content)"
    then = state["fields"] | {store: state["store"], tokenizer: state["tokenizer"]}
    now = trainer.recipe.fields_affecting_weights() | {store: trainer.store.digest, tokenizer: trainer.tokenizer.digest}
    return [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(then | now)
        if then.get(key) != now.get(key)
    ]


def _check_changes_allowed(changed: list[str], folder: Path, allow_change: bool) -> None:
    never = [change for change in changed if change.startswith(_IMMUTABLE_FIELDS)]
    if never or (changed and not allow_change):
        also = "" if never else ", or --allow-change to continue with this recipe"
        undo = "undo the change, give the run another name (--name)"
        raise InputError(f"{folder}: made by another recipe: {'; '.join(changed)}; {undo}{also}")


def roll_back(trainer: TrainState, journal: RunLog | None, step: int, reason: str, blamed: int) -> None:
    """Leave out the `blamed` newest batches up to step `step`'s, so that `resume` goes on without them.

    Raises RunStoppedError where the run has gone back to its newest checkpoint as often as it may.
    """
    newest = checkpoint.list_committed(trainer.run)[-1:]
    target = broadcast_from_rank0(checkpoint.step_of(newest[0]) if newest else 0, trainer.ranks)
    guard, words = trainer.recipe.guard, f"step {step + 1}: {reason}"
    if sum(record["checkpoint"] == target for record in trainer.went_back) >= guard.max_rollbacks:
        is_spike = "against a median" in reason
        too_strict = ", or a higher guard.spike_z_score if this loss is no fault" if is_spike else ""
        raise RunStoppedError(
            f"{trainer.run}: {words}; went back to step {target} {guard.max_rollbacks} times already: run this again "
            f"with --allow-change, a higher guard.max_rollbacks and a lower train.optimizer.learning_rate{too_strict}"
        )
    # No batch from before the checkpoint: its steps are not done again, and counting them out would shift the others.
    batches = [
        batch_index_for_step(number, trainer.skipped_batches)
        for number in range(max(target, step + 1 - blamed), step + 1)
    ]
    if journal:
        record_rollback(trainer.run, {"batches": batches, "checkpoint": target, "step": step + 1, "reason": reason})
        journal.event("rollback", step + 1, reason=reason, checkpoint=target, skipped_batches=batches)
        echo(f"{words}; back to step {target}, leaving out batches {batches}", to_stderr=True)
