"""The training loop: next batch, forward and backward, check, update, log, maybe validate and save.

Reads the token store and the tokenizer, writes `runs/NAME/`. Nothing but the step and the batches that the run leaves
out decide what is read, so going on after an interruption is loading the newest whole checkpoint and counting on.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama import hardware
from tinyllama.data.batches import batch_index_for_step, batches
from tinyllama.errors import InputError, RunStoppedError, first_line
from tinyllama.files import exclusive_lock, reject_symlinks
from tinyllama.formatting import echo
from tinyllama.progress import Bar
from tinyllama.recipe import Recipe
from tinyllama.runs import checkpoint
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.trackers import Trackers, check_trackers
from tinyllama.train import signals
from tinyllama.train.distributed import all_reduce_sum, init_distributed, is_peer_failure
from tinyllama.train.guard import Action, Heartbeat, SpikeDetector, watchdog
from tinyllama.train.milestones import (
    ReleaseQueue,
    checkpoints_to_keep,
    pending_milestones,
)
from tinyllama.train.optimizer import clip_grad_norm, optimizer_step, zero_grad
from tinyllama.train.resume import resume, roll_back
from tinyllama.train.schedule import learning_rate
from tinyllama.train.setup import TrainState, build, read_initial_weights_info, write_run_folder
from tinyllama.train.throughput import ThroughputMeter
from tinyllama.train.validation import validate


@dataclass
class Session:
    """One process's time on a run: what stands beside the trainer while it goes on."""

    trainer: TrainState
    journal: RunLog | None
    """On the first rank; so is the next."""
    bar: Bar | None
    meter: ThroughputMeter
    saver: checkpoint.CheckpointWriter
    received: signals.PendingSignal
    watch: Heartbeat = field(default_factory=Heartbeat)
    """Tells the watchdog that something moves."""
    step: int = 0
    """The step under way, counted from 0."""


def train(recipe: Recipe, *, allow_change: bool = False) -> Path:
    """Train the recipe's model, going on where its run stands, and return the run's folder.

    Raises InputError where the store, the tokenizer, the ranks or an earlier part of the run do not fit the recipe, and
    RunStoppedError where the run ended before its last step.
    """
    hardware.tune_malloc()
    check_trackers(recipe.track)
    with init_distributed(recipe.guard.watchdog_seconds) as ranks, ExitStack() as stack:
        trainer = build(recipe, ranks)
        if ranks.is_main:
            reject_symlinks(trainer.run)
            stack.enter_context(
                exclusive_lock(trainer.run, "lock", f"{trainer.run}: another process is training this run")
            )
        journal = RunLog(RunDir(trainer.run), recipe.checkpoint.on_failure == "continue") if ranks.is_main else None
        releaser = stack.enter_context(ReleaseQueue(trainer.run, journal, ranks.device)) if journal else None
        with _translate_system_errors(trainer.run, journal):
            _train_and_release(trainer, journal, releaser, allow_change)
        return trainer.run


@contextmanager
def _translate_system_errors(run: Path, journal: RunLog | None) -> Iterator[None]:
    """Turn a full disk and the loss of another rank into what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        words = "make room and run it again: it goes on from the last checkpoint"
        raise RunStoppedError(f"{error.filename or run}: {error.strerror}; {words}") from error
    except RuntimeError as error:
        is_torchs = type(error).__module__.startswith("torch._")
        if is_torchs and os.strerror(errno.ENOSPC) in str(error):  # of the compiler's process, or wrapped
            folders = f"{os.environ.get('TMPDIR', '/tmp')} and {os.environ.get('TORCHINDUCTOR_CACHE_DIR')}"
            words = f"free some space in {folders}, or set TMPDIR and XDG_CACHE_HOME"
            raise RunStoppedError(f"{run}: torch.compile finds no space; {words}") from error
        if isinstance(error, RunStoppedError) or not is_peer_failure(error):
            raise
        if journal:
            journal.event("rank-lost", journal.step, problem=first_line(error))
        again = "find in its output why it ended, and run this again (torchrun --max-restarts=N does that by itself)"
        raise RunStoppedError(f"{run}: another rank cannot be reached any more; {again}") from error


def _train_and_release(
    trainer: TrainState, journal: RunLog | None, releaser: ReleaseQueue | None, allow_change: bool
) -> None:
    """All steps that are left, and all releases."""
    if journal:
        journal.drop_partial_lines()
    first_step, state = resume(trainer, journal, allow_change)
    if journal:
        write_run_folder(trainer)
    shown = Trackers(trainer.recipe.track, RunDir(trainer.run), journal) if journal else nullcontext()
    with shown, _log_run_end(journal):
        if releaser:
            releaser.add(pending_milestones(trainer.run))
        if first_step < trainer.recipe.train.steps:
            with ExitStack() as stack:
                session = _open_session(trainer, journal, releaser, first_step, state, stack)
                while not _train_from(session, first_step, SpikeDetector(trainer.recipe.guard, state.get("guard"))):
                    with session.watch.paused():
                        first_step, state = resume(trainer, journal, allow_change)
                _wait_for_checkpoint(session, must=True)
        if releaser and (failed := releaser.finish()):
            steps = ", ".join(map(str, failed))
            words = f"trained, but the release of step {steps} failed"
            remedy = f"remove the cause, which is in {trainer.run / 'events.jsonl'}, and run this again"
            raise RunStoppedError(f"{trainer.run}: {words}; {remedy}")


@contextmanager
def _log_run_end(journal: RunLog | None) -> Iterator[None]:
    """Make an event of how the run ends; the loss of a rank has its own."""
    try:
        yield
    except KeyboardInterrupt:
        _log_end_event(journal, "interrupted")
        raise
    except RunStoppedError as stop:
        if stop.status == signals.REQUEUE_STATUS:
            _log_end_event(journal, "signal", signal=str(stop).partition(":")[0])
        else:
            _log_end_event(journal, "failed", problem=str(stop))
        raise
    except Exception as error:
        if not (isinstance(error, RuntimeError) and is_peer_failure(error)):
            _log_end_event(journal, "failed", problem=str(error) if isinstance(error, InputError) else repr(error))
        raise
    _log_end_event(journal, "done")


def _log_end_event(journal: RunLog | None, name: str, **details: str) -> None:
    if journal:
        with suppress(OSError):  # what fills the disk ends the run and its event
            journal.event(name, journal.step, **details)


def _open_session(
    trainer: TrainState,
    journal: RunLog | None,
    releaser: ReleaseQueue | None,
    first_step: int,
    state: dict[str, Any],
    stack: ExitStack,
) -> Session:
    recipe, ranks = trainer.recipe, trainer.ranks
    bar = stack.enter_context(_bar(recipe, trainer.run, first_step)) if journal else None
    on_commit = partial(_on_checkpoint_saved, trainer, journal, releaser)
    before_commit = journal.flush_to_disk if journal else (lambda: None)
    saver = checkpoint.CheckpointWriter(trainer.run, recipe.checkpoint.asynchronous, on_commit, before_commit)
    stack.callback(saver.close)
    meter = ThroughputMeter(recipe, trainer.model.vocab_size, ranks, state.get("hardware", []))
    received = stack.enter_context(signals.record_signals())
    session = Session(trainer, journal, bar, meter, saver, received, step=first_step)
    session.watch = stack.enter_context(watchdog(recipe.guard.watchdog_seconds, partial(_on_hang, session)))
    return session


def _train_from(session: Session, first_step: int, guard: SpikeDetector) -> bool:
    """Train from a step to the last; False where the guard sent the run back to a checkpoint."""
    trainer = session.trainer
    recipe, ranks, skipped_batches = trainer.recipe, trainer.ranks, trainer.skipped_batches
    order = batches(recipe, trainer.store, first_step, ranks.rank, ranks.count, skipped_batches)
    session.meter.restart()
    for step, rows in enumerate(order, first_step):
        session.step = step
        loss, norm = forward_backward(trainer, rows, session.watch)
        stop, save_failed = _sync_flags(session)
        verdict, reason, blamed = guard.check(loss, norm)
        if verdict is Action.ROLL_BACK:
            zero_grad(trainer.optimizers)
            _wait_for_checkpoint(session)
            roll_back(trainer, session.journal, step, reason, blamed)
            return False
        if verdict is Action.APPLY:
            optimizer_step(trainer.optimizers, _learning_rate_at(recipe, step))
        zero_grad(trainer.optimizers)
        _log(session, _row(session, step, loss, norm, skipped=reason))
        if save_failed:
            _wait_for_checkpoint(session)
        if stop or _is_saved(trainer, step + 1):
            _save(session, step + 1, guard)
        if stop and step + 1 < recipe.train.steps:
            _exit_on_signal(session, step + 1)
    return True


def forward_backward(
    trainer: TrainState, rows: Tensor, alive: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """Leave in the parameters the clipped gradient of this rank's rows of a batch, int64 [rows, sequence_length + 1].

    Returns the mean loss over all tokens of the whole batch and the gradient's norm before clipping; calls `alive` at
    each micro-batch.
    """
    recipe, ranks = trainer.recipe.train, trainer.ranks
    total = torch.zeros((), device=ranks.device, dtype=torch.float64)
    for part in rows.to(ranks.device).split(_micro_batch_size(trainer)):
        nats = trainer.model.loss(part[:, :-1], part[:, 1:], recipe.z_loss)
        # FSDP means gradients over the ranks; the loss is a sum over them, hence the factor.
        (nats * (ranks.count / recipe.batch_tokens)).backward()
        total += nats.detach()
        alive()
    norm = clip_grad_norm(trainer.model, recipe.optimizer.max_gradient_norm)
    return float(all_reduce_sum(total, ranks)) / recipe.batch_tokens, float(norm)


def _micro_batch_size(trainer: TrainState) -> int:
    return trainer.recipe.train.effective_micro_batch_size(trainer.ranks.count)


def _learning_rate_at(recipe: Recipe, step: int) -> float:
    return learning_rate(recipe.train.schedule, recipe.train.optimizer.learning_rate, step, recipe.train.steps)


def _sync_flags(session: Session) -> tuple[bool, bool]:
    """Whether any rank was told to stop, and whether any knows that the checkpoint under way has failed."""
    mine = torch.tensor([session.received.number is not None, session.saver.has_failed], dtype=torch.int32)
    stop, save_failed = all_reduce_sum(mine.to(session.trainer.ranks.device), session.trainer.ranks).tolist()
    return bool(stop), bool(save_failed)


def _row(session: Session, step: int, loss: float, norm: float, skipped: str) -> dict[str, Any]:
    """The row of metrics of the step that just ended; where it was skipped, `skipped` says why."""
    trainer, recipe, done = session.trainer, session.trainer.recipe, step + 1
    row: dict[str, Any] = {"step": done, "tokens": done * recipe.train.batch_tokens, "loss": loss}
    row |= {"learning_rate": _learning_rate_at(recipe, step), "gradient_norm": norm, **session.meter.row()}
    if trainer.skipped_batches:
        row["batch"] = batch_index_for_step(step, trainer.skipped_batches)
    if skipped:  # JSON has no number for what is not finite
        row |= {"loss": None, "gradient_norm": None, "skipped": skipped}
    if trainer.validation and (done % recipe.train.validate_every_steps == 0 or done == recipe.train.steps):
        score = validate(trainer.model, trainer.validation, _micro_batch_size(trainer), trainer.ranks, session.watch)
        row |= {"validation_loss": score.loss, "validation_bits_per_byte": score.bits_per_byte}
        session.meter.restart()
    return row


def _log(session: Session, row: dict[str, Any]) -> None:
    if session.journal and session.bar:
        session.journal.metrics(row)
        if "skipped" in row:
            session.journal.event("skip", row["step"], reason=row["skipped"])
        session.bar.show(row["step"], _status_text(row))


def _bar(recipe: Recipe, run: Path, first_step: int) -> Bar:
    label, size = f"training {recipe.name}", recipe.train.batch_tokens
    where = f"`tinyllama watch {run}` shows it; all it writes is in {run}" if recipe.track.trackio else f"see {run}"
    return Bar(label, recipe.train.steps, "steps", first_step, rate="tokens", each=size, where=where)


def _status_text(row: dict[str, Any]) -> str:
    share = f", MFU {100 * row['mfu']:.0f} %" if row["mfu"] else ""
    return (f"skipped: {row['skipped']}" if "skipped" in row else f"loss {row['loss']:.3f}") + share


def _is_saved(trainer: TrainState, done: int) -> bool:
    recipe = trainer.recipe
    return done % recipe.checkpoint.every_steps == 0 or done == recipe.train.steps or done in trainer.milestone_steps


def _save(session: Session, done: int, guard: SpikeDetector) -> None:
    trainer, recipe, begun = session.trainer, session.trainer.recipe, time.perf_counter()
    _wait_for_checkpoint(session)
    state = {
        "tokens": done * recipe.train.batch_tokens,
        "time": time.time(),
        "digest": recipe.digest,
        "fields": recipe.fields_affecting_weights(),
        "store": trainer.store.digest,
        "tokenizer": trainer.tokenizer.digest,
        "vocab_size": trainer.model.vocab_size,
        "initial_weights": read_initial_weights_info(trainer.run) if trainer.ranks.is_main else None,
        "ranks": trainer.ranks.count,
        "hardware": session.meter.hardware(),
        "milestone": done in trainer.milestone_steps,
        "guard": guard.state(),
    }
    with session.watch.paused():
        session.saver.begin(done, trainer.model, trainer.optimizers, state, begun)
    session.meter.restart()


def _on_checkpoint_saved(
    trainer: TrainState,
    journal: RunLog | None,
    releaser: ReleaseQueue | None,
    step: int,
    seconds: float,
    stood_still: float,
) -> None:
    """After a commit, on the first rank, in the saver's thread."""
    assert journal is not None and releaser is not None
    run, recipe = trainer.run, trainer.recipe
    checkpoint.prune(run, recipe.checkpoint.keep, checkpoints_to_keep(run, recipe.release.average_checkpoints))
    journal.event("checkpoint", step, seconds=round(seconds, 3), stall_seconds=round(stood_still, 3))
    if step in trainer.milestone_steps:
        releaser.add([step])


def _wait_for_checkpoint(session: Session, must: bool = False) -> None:
    """Wait for the checkpoint under way; where it failed: an event, and the end if the recipe says so or `must`."""
    reason = session.saver.settle(session.watch)
    session.watch()
    if reason is None:
        return
    run, recipe = session.trainer.run, session.trainer.recipe.checkpoint
    words = f"{run}: the checkpoint of step {session.saver.step} cannot be written ({reason})"
    if session.journal:
        session.journal.event("checkpoint-failed", session.saver.step, problem=reason)
    if must or recipe.on_failure == "stop":
        is_full = any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT))
        remedy = "make room" if is_full else f"remove that cause, so that {run / 'checkpoints'} can be written,"
        raise RunStoppedError(f"{words}; {remedy} and run this again: it resumes from the checkpoint before")
    if session.journal:
        echo(f"{words}; training continues", to_stderr=True)


def _exit_on_signal(session: Session, step: int) -> None:
    """End after a save that a signal asked for, with the status that schedulers requeue on."""
    _wait_for_checkpoint(session, must=True)
    name = session.received.number.name if session.received.number else "a signal to another rank"
    raise RunStoppedError(
        f"{name}: saved at step {step}; the same command goes on from there", status=signals.REQUEUE_STATUS
    )


def _on_hang(session: Session) -> None:
    """From the watchdog's thread, on whichever rank notices."""
    rank, seconds = session.trainer.ranks.rank, session.trainer.recipe.guard.watchdog_seconds
    RunLog(RunDir(session.trainer.run)).event("hang", session.step + 1, rank=rank, seconds=seconds)
    echo(f"rank {rank}: no step within guard.watchdog_seconds, {seconds:g} s; ending this process", to_stderr=True)
