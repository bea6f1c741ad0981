"""Resuming: a run continues from its newest valid checkpoint. A run without a checkpoint starts from step 0.

Rank 0 chooses and broadcasts the checkpoint, so all ranks use the same checkpoint and each file is hashed only once.
"""

from typing import Any

from tinyllama import hardware
from tinyllama.data.batches import batch_index_for_step
from tinyllama.distributed import broadcast_from_rank0
from tinyllama.errors import InputError, RunStoppedError
from tinyllama.files import write_json
from tinyllama.formatting import echo
from tinyllama.recipe import differences
from tinyllama.runs.checkpoint import load_checkpoint
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import CheckpointDir, RunDir
from tinyllama.train.guard import Decision, discard_stale_rollbacks
from tinyllama.train.setup import TrainState, initialize_weights

_IMMUTABLE_FIELDS = (
    "model.",
    "another tokenizer ",
    "train.optimizer.name ",
    "train.batch_sequences ",
    "train.sequence_length ",
)
"""Recipe fields that determine a checkpoint's tensors or the meaning of its step number."""


def resume(state: TrainState, log: RunLog | None, allow_change: bool) -> tuple[int, dict[str, Any]]:
    """Load the newest valid checkpoint; return the next step, counted from 0, and the checkpoint's state.

    Without a checkpoint, initialize the weights and return step 0 and an empty state. Raises InputError if the
    checkpoint was made with another recipe and `allow_change` is false, or if the run is beyond `train.tokens`.
    """
    newest = _agree_on_checkpoint(state, log)
    step, saved, changes = 0, dict[str, Any](), list[str]()
    if newest is None:
        initialize_weights(state)
        changes = (state.run.initial_weights() or {}).get("changed", []) if log else []
    else:
        step, saved = newest.step, newest.state()
        changes = _recipe_changes(state, saved)
        is_immutable = any(change.startswith(_IMMUTABLE_FIELDS) for change in changes)
        if changes and (is_immutable or not allow_change):
            allow = "" if is_immutable else ", or --allow-change to continue with this recipe"
            remedy = f"undo the change, give the run another name (--name){allow}"
            raise InputError(f"{newest.path}: made with another recipe: {'; '.join(changes)}; {remedy}")
        if step > state.recipe.train.steps:
            raise InputError(
                f"{newest.path}: the run is beyond train.tokens, {state.recipe.train.tokens:,}; raise train.tokens, or "
                "delete the later checkpoints to train again from there"
            )
        load_checkpoint(newest, state.model, state.optimizers)
    if log:
        log.truncate_after(step)
        details = {"ranks": state.world.size, "device": hardware.device_name(state.world.device)}
        details |= {"changed": changes} if changes else {}
        log.event("resume" if newest else "start", step, **details)
    return step, saved


def describe_start(state: TrainState, step: int) -> str:
    """Describe in one line how training starts.

    At step 0, the line has the model's size and the device. If there are external weights, it also has their source
    and the fields of the context and the rotary embedding that differ. At a later step, the line has the step.
    """
    train, world = state.recipe.train, state.world
    if step == train.steps:
        return f"all {step:,} steps are done"
    if step:
        return f"resuming from step {step:,} of {train.steps:,}"
    size = f"{state.model.num_parameters:,} parameters"
    where = f"{world.size} ranks, each on " if world.size > 1 else "on "
    steps = f"{train.steps:,} steps of {train.batch_tokens:,} tokens"
    initial = state.run.initial_weights()
    weights = "; ".join([f"; weights of {initial['source']}", *initial.get("changed", [])]) if initial else ""
    return f"{size}, {steps}, {where}{hardware.device_name(world.device)}{weights}"


def _agree_on_checkpoint(state: TrainState, log: RunLog | None) -> CheckpointDir | None:
    """Return the checkpoint to resume from, and load the rollbacks into `state`; rank 0 reads both."""
    newest, rollbacks = None, []
    if log:
        newest = _newest_valid_checkpoint(state.run, log)
        if newest is None:
            discard_stale_rollbacks(state.run)
        rollbacks = state.run.rollbacks()
    newest, state.rollbacks = broadcast_from_rank0((newest, rollbacks), state.world)
    return newest


def _newest_valid_checkpoint(run: RunDir, log: RunLog) -> CheckpointDir | None:
    """Return the newest checkpoint whose hashes match; log and delete newer checkpoints, which are damaged.

    Raises InputError if all checkpoints are damaged.
    """
    damaged: list[CheckpointDir] = []
    for found in reversed(run.checkpoints()):
        damage = found.find_damage()
        if not damage:
            for other in damaged:  # otherwise pruning would count them among the newest checkpoints
                other.delete()
            return found
        echo(f"{damage[0]}; trying an older checkpoint", to_stderr=True)
        log.event("checkpoint-damaged", found.step, problem=damage[0])
        damaged.append(found)
    if damaged:
        remedy = f"restore the files, or delete {run.checkpoints_dir} to start again from step 0"
        raise InputError(f"{run.path}: all of its checkpoints are damaged ({damage[0]}); {remedy}")
    return None


def _recipe_changes(state: TrainState, saved: dict[str, Any]) -> list[str]:
    """Return one line per value that affects the weights and differs from the value in the checkpoint."""
    fields = differences(saved["fields"], state.recipe.fields_affecting_weights())
    changes = [f"{key} was {then!r}, is {value!r}" for key, (then, value) in sorted(fields)]
    contents = (
        ("token store", saved["store"], state.store.digest),
        ("tokenizer", saved["tokenizer"], state.tokenizer.digest),
    )
    return changes + [
        f"another {name} (sha256 was {then[:12]}, is {now[:12]})" for name, then, now in contents if then != now
    ]


def roll_back(state: TrainState, log: RunLog | None, step: int, decision: Decision) -> None:
    """Record a rollback to the newest checkpoint; exclude the suspect batches, up to and including that of `step`.

    The caller then calls `resume`. Raises RunStoppedError after `guard.max_rollbacks` rollbacks to the same checkpoint.
    """
    newest = state.run.newest_checkpoint()
    target = broadcast_from_rank0(newest.step if newest else 0, state.world)
    guard, problem = state.recipe.guard, f"step {step + 1}: {decision.reason}"
    if sum(record["checkpoint"] == target for record in state.rollbacks) >= guard.max_rollbacks:
        remedy = "rerun with --allow-change, a higher guard.max_rollbacks and a lower train.optimizer.learning_rate"
        remedy += ", or a higher guard.spike_z_score if this loss is not a fault" if decision.is_spike else ""
        count = f"rolled back to step {target} {guard.max_rollbacks} times already"
        raise RunStoppedError(f"{state.run.path}: {problem}; {count}: {remedy}")
    # Exclude only batches after the checkpoint. Steps before the checkpoint are not repeated, so excluding one of their
    # batches would shift all later batches.
    first_step = max(target, step + 1 - decision.num_suspect_batches)
    skipped = [batch_index_for_step(number, state.skipped_batches) for number in range(first_step, step + 1)]
    if log:
        record = {"batches": skipped, "checkpoint": target, "step": step + 1, "reason": decision.reason}
        write_json(state.run.rollbacks_path, [*state.rollbacks, record])
        log.event("rollback", step + 1, reason=decision.reason, checkpoint=target, skipped_batches=skipped)
        echo(f"{problem}; rolled back to step {target}, skipping batches {skipped}", to_stderr=True)
