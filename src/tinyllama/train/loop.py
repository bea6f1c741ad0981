"""The training loop: next batch, forward and backward, check, optimizer step, log, validate, save.

Training reads the token store and the tokenizer, and writes `runs/NAME/`. The step number and the skipped batches alone
determine the next batch. A run therefore resumes by loading its newest valid checkpoint and continuing at the next step
number.
"""

import errno
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama import hardware
from tinyllama.data.batches import batch_index_for_step, batches
from tinyllama.distributed import (
    World,
    all_reduce_sum,
    begin_micro_batch,
    init_distributed,
    kept_cast_weights,
)
from tinyllama.errors import InputError, RunStoppedError, SavedInterrupt
from tinyllama.evaluate.results import Evaluation, task_score
from tinyllama.files import exclusive_lock, reject_symlinks
from tinyllama.formatting import echo
from tinyllama.processes import record_signals
from tinyllama.progress import Bar, is_quiet
from tinyllama.recipe import Recipe
from tinyllama.runs.checkpoint import CheckpointWriter
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.runs.samples import format_sample
from tinyllama.tokenizer import Tokenizer
from tinyllama.tracking.trackers import check_trackers, run_trackers
from tinyllama.train.guard import Action, Decision, SpikeDetector, watchdog
from tinyllama.train.loss_scale import LossScale
from tinyllama.train.milestones import ReleaseQueue
from tinyllama.train.resume import describe_start, resume, roll_back
from tinyllama.train.run_end import log_run_end, translate_system_errors
from tinyllama.train.samples import complete_prompts
from tinyllama.train.setup import Evaluator, TrainState, build, clip_grad_norm, optimizer_step, write_run_folder
from tinyllama.train.throughput import ThroughputMeter
from tinyllama.train.validation import validate

LoadEvaluator = Callable[[Recipe, Tokenizer, World], Evaluator]
"""Function that prepares evaluations during training; see `evaluate.evaluation.load_evaluator`."""
_CONSTANTS = ("total_items", "chance")
"""Names in a task's row that all evaluations of a run have in common; evaluations.jsonl has them."""


def train(recipe: Recipe, *, allow_change: bool = False, load_evaluator: LoadEvaluator | None = None) -> Path:
    """Train the recipe's model, or resume its run; return the run's folder.

    `load_evaluator` is required if the recipe has `train.evaluate_every_steps`. Raises InputError if the store, the
    tokenizer, the number of ranks or an existing run do not fit the recipe. Raises RunStoppedError if the run stops
    before its last step or a release is missing at the end.
    """
    hardware.tune_malloc()
    check_trackers(recipe.track)
    with init_distributed(recipe.guard.watchdog_seconds) as world:
        return _train_on(world, recipe, allow_change, load_evaluator)


def _train_on(world: World, recipe: Recipe, allow_change: bool, load_evaluator: LoadEvaluator | None) -> Path:
    """Train on this rank, as `train` does; when the function returns, no reference to the model remains."""
    with ExitStack() as stack:
        state = build(recipe, world)
        if recipe.train.evaluate_every_steps:
            if load_evaluator is None:
                raise InputError("train.evaluate_every_steps: needs an evaluator; call tinyllama.train_model")
            state.evaluate = load_evaluator(recipe, state.tokenizer, world)
        run, log, releases = state.run, None, None
        if world.is_main:
            reject_symlinks(run.path, is_run=True)
            stack.enter_context(exclusive_lock(run.lock_path, f"{run.path}: another process is training this run"))
            log = RunLog(run, recipe.checkpoint.on_failure == "continue")
            releases = stack.enter_context(ReleaseQueue(run, log, world.device))
        with translate_system_errors(run, log):
            _train_and_release(state, log, releases, allow_change)
        return run.path


def _train_and_release(
    state: TrainState, log: RunLog | None, releases: ReleaseQueue | None, allow_change: bool
) -> None:
    """Run all remaining steps and releases."""
    recipe = state.recipe
    if log:
        log.drop_partial_lines()
    first_step, saved = resume(state, log, allow_change)
    if log:
        write_run_folder(state)
        if not is_quiet():
            echo(f"training {recipe.name}: {describe_start(state, first_step)}", to_stderr=True)
    with run_trackers(recipe.track, state.run, log) if log else nullcontext(), log_run_end(log, recipe.train.steps):
        if releases:
            releases.add(state.run.pending_milestones())
        if first_step < recipe.train.steps:
            with ExitStack() as stack:
                loop = TrainingLoop(state, log, releases, first_step, saved, stack)
                while not loop.train_from(first_step, saved):
                    with loop.heartbeat.paused():
                        first_step, saved = resume(state, log, allow_change)
                loop.wait_for_checkpoint(is_last=True)
                # A signal in the last step or during its checkpoint. Only rank 0 would make releases after it.
                if log and loop.signals.names:
                    loop.exit_on_signal()
        if releases and (failed := releases.finish()):
            problem = f"training finished, but the release of step {', '.join(map(str, failed))} failed"
            remedy = f"correct the cause, which {state.run.events_path} names, and rerun the same command"
            raise RunStoppedError(f"{state.run.path}: {problem}; {remedy}")


class TrainingLoop:
    """The training loop of a run on this rank, with its log, validation and checkpoints."""

    def __init__(
        self,
        state: TrainState,
        log: RunLog | None,
        releases: ReleaseQueue | None,
        first_step: int,
        saved: dict[str, Any],
        stack: ExitStack,
    ) -> None:
        """Prepare to train from `first_step`; `saved` is the state of the checkpoint that the run resumed from.

        Only rank 0 has `log` and `releases`. `stack` closes the resources that the constructor opens.
        """
        recipe = state.recipe
        self.state, self.log, self.releases = state, log, releases
        self.step = first_step
        self.stop_step = first_step + 1
        """Step after which the run ends if a signal arrives now."""
        self.bar = stack.enter_context(_progress_bar(recipe, state.run, first_step)) if log else None
        before_commit = log.flush_to_disk if log else (lambda: None)
        self.writer = stack.enter_context(
            CheckpointWriter(state.run, recipe.checkpoint.asynchronous, self._on_checkpoint_saved, before_commit)
        )
        self.throughput = ThroughputMeter(recipe, state.model.vocab_size, state.world, saved.get("hardware", []))
        self.signals = stack.enter_context(record_signals(self._on_interrupt))
        # If a rank dies, gloo's collectives fail on the other ranks, but NCCL's collectives wait.
        signals = self.signals if state.world.size > 1 and state.world.device.type == "cuda" else None
        self.heartbeat = stack.enter_context(watchdog(recipe.guard.watchdog_seconds, self._on_hang, signals))

    def train_from(self, first_step: int, saved: dict[str, Any]) -> bool:
        """Train from `first_step` to the last step; return False if the spike detector rolled the run back.

        `saved` is the state of the checkpoint of `first_step`, or empty at step 0.
        """
        state, recipe, world = self.state, self.state.recipe, self.state.world
        detector = SpikeDetector(recipe.guard, saved.get("guard"))
        loss_scale = LossScale(recipe.train.precision, saved.get("loss_scale"))
        order = batches(recipe, state.store, first_step, world.rank, world.size, state.skipped_batches)
        self.throughput.restart()
        for step, (sequences, document_starts) in enumerate(order, first_step):
            self.step, self.stop_step = step, step + 1
            _check_token_ids(state, sequences)
            scale = loss_scale.value
            loss, norm, should_stop, save_failed = self._synchronize(
                *forward_backward(state, sequences, self.heartbeat, scale, document_starts)
            )
            self.signals.can_save = True
            decision = loss_scale.check(loss, norm) or detector.check(loss, norm)
            if decision.action is Action.ROLL_BACK:
                state.model.zero_grad()
                self.wait_for_checkpoint()
                roll_back(state, self.log, step, decision)
                return False
            if decision.action is Action.APPLY:
                optimizer_step(state.optimizers, recipe.train.learning_rate_at(step))
            state.model.zero_grad()
            self._log_step(loss, norm, decision, scale)
            steps_done = step + 1
            if save_failed:
                self.wait_for_checkpoint()
            if should_stop or self._is_saved(steps_done):
                self._save(steps_done, detector, loss_scale)
            if should_stop and steps_done < recipe.train.steps:
                self.exit_on_signal()
        return True

    def _synchronize(self, nats: Tensor, norm: Tensor) -> tuple[float, float, bool, bool]:
        """Return the mean loss, the gradient norm, and whether any rank received a signal or could not save.

        This is the only point of a step at which the CPU waits for the GPU and for other ranks.
        """
        flags = (float(bool(self.signals.names)), float(self.writer.has_failed))
        self.stop_step = min(self.step + 2, self.state.recipe.train.steps)
        # filled on the GPU, because a copy of a CPU tensor would make the CPU wait for the GPU
        parts = (nats, *(nats.new_full((), flag) for flag in flags))
        sums = all_reduce_sum(torch.stack(parts), self.state.world)
        total, stops, failures, norm_value = torch.cat((sums, norm[None])).tolist()
        return total / self.state.recipe.train.batch_tokens, norm_value, bool(stops), bool(failures)

    def _log_step(self, loss: float, norm: float, decision: Decision, loss_scale: float) -> None:
        """Log the metrics of the completed step, including a validation if one is due."""
        state, recipe, steps_done = self.state, self.state.recipe, self.step + 1
        row: dict[str, Any] = {"step": steps_done, "tokens": steps_done * recipe.train.batch_tokens, "loss": loss}
        row |= {"learning_rate": recipe.train.learning_rate_at(self.step), "gradient_norm": norm}
        row |= self.throughput.metrics()
        if state.skipped_batches:
            row["batch"] = batch_index_for_step(self.step, state.skipped_batches)
        if recipe.train.precision == "fp16":
            row["loss_scale"] = loss_scale
        if decision.action is not Action.APPLY:  # JSON has no NaN and no infinity
            has_loss = decision.action is Action.OVERFLOW
            row |= {"loss": loss if has_loss else None, "gradient_norm": None, "skipped": decision.reason}
        if steps_done % recipe.train.validate_every_steps == 0 or steps_done == recipe.train.steps:
            self._log_samples(steps_done)
            row |= self._validate()
            self.throughput.restart()
        every = recipe.train.evaluate_every_steps
        if state.evaluate and every and (steps_done % every == 0 or steps_done == recipe.train.steps):
            row |= self._evaluate(state.evaluate(state.model, steps_done, self.heartbeat))
            self.throughput.restart()
        if self.log and self.bar:
            self.log.metrics(row)
            if decision.action is Action.SKIP:
                self.log.event("skip", steps_done, reason=decision.reason)
            is_rated = row["mfu"] and state.world.device.type != "cpu"  # a CPU has only a measured peak
            mfu = f", MFU {100 * row['mfu']:.0f} %" if is_rated else ""
            self.bar.show(steps_done, (f"skipped: {row['skipped']}" if "skipped" in row else f"loss {loss:.3f}") + mfu)

    def _log_samples(self, steps_done: int) -> None:
        """Complete the run's prompts on all ranks; log the samples and show the first one."""
        state, is_compiled = self.state, self.state.recipe.train.compile
        samples = complete_prompts(state.model, state.tokenizer, state.sample_prompts, is_compiled, self.heartbeat)
        if self.log:
            self.log.samples(steps_done, samples)
            if samples and not is_quiet():
                echo(format_sample(steps_done, samples[0]["prompt"], samples[0]["greedy"]), to_stderr=True)

    def _validate(self) -> dict[str, float]:
        """Return the metrics of a validation; without validation text, there are none."""
        state, train = self.state, self.state.recipe.train
        if not state.validation_set:
            return {}
        micro_batch_size = train.effective_micro_batch_size(state.world.size)
        return validate(state.model, state.validation_set, micro_batch_size, state.world, self.heartbeat).metrics()

    def _evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        """Log an evaluation; return its metrics by name: `evaluation/TASK/METRIC`."""
        if self.log:
            self.log.evaluation(asdict(evaluation))
            for task, row in evaluation.rows.items():
                if (score := task_score(row)) and not is_quiet():
                    scored = f"{task} {score.metric} {score}, {evaluation.coverage[task]}"
                    echo(f"step {evaluation.step:,}: {scored}", to_stderr=True)
        metrics = ((task, name, value) for task, row in evaluation.rows.items() for name, value in row.items())
        return {f"evaluation/{task}/{name}": value for task, name, value in metrics if name not in _CONSTANTS}

    def _is_saved(self, steps_done: int) -> bool:
        recipe = self.state.recipe
        is_due = steps_done % recipe.checkpoint.every_steps == 0 or steps_done == recipe.train.steps
        return is_due or steps_done in self.state.milestone_steps

    def _save(self, steps_done: int, detector: SpikeDetector, loss_scale: LossScale) -> None:
        """Wait for the previous checkpoint, then start writing a new checkpoint."""
        state, recipe, start = self.state, self.state.recipe, time.perf_counter()
        self.wait_for_checkpoint()
        content = {
            "tokens": steps_done * recipe.train.batch_tokens,
            "time": time.time(),
            "digest": recipe.digest,
            "fields": recipe.fields_affecting_weights(),
            "store": state.store.digest,
            "tokenizer": state.tokenizer.digest,
            "vocab_size": state.model.vocab_size,
            "initial_weights": state.run.initial_weights() if state.world.is_main else None,
            "ranks": state.world.size,
            "hardware": self.throughput.hardware(),
            "milestone": steps_done in state.milestone_steps,
            "guard": detector.state(),
            "loss_scale": loss_scale.state(),
        }
        with self.heartbeat.paused():
            self.writer.start_save(steps_done, state.model, state.optimizers, content, start)
        self.throughput.restart()

    def _on_checkpoint_saved(self, step: int, seconds: float, stall_seconds: float) -> None:
        """Prune checkpoints, log the commit, and queue a milestone's release.

        The writer's thread on rank 0 calls this method.
        """
        assert self.log is not None and self.releases is not None
        recipe = self.state.recipe
        self.state.run.prune_checkpoints(recipe.checkpoint.keep, recipe.release.average_checkpoints)
        self.log.event("checkpoint", step, seconds=round(seconds, 3), stall_seconds=round(stall_seconds, 3))
        if step in self.state.milestone_steps:
            self.releases.add([step])

    def wait_for_checkpoint(self, is_last: bool = False) -> None:
        """Wait for the checkpoint being written; log an event if writing failed.

        After a failure, raises RunStoppedError if `is_last` is true or `checkpoint.on_failure` is `stop`.
        """
        reason = self.writer.wait(self.heartbeat)
        self.heartbeat()
        if reason is None:
            return
        run, step = self.state.run, self.writer.step
        problem = f"{run.path}: the checkpoint of step {step} cannot be written ({reason})"
        if self.log:
            self.log.event("checkpoint-failed", step, problem=reason)
        if is_last or self.state.recipe.checkpoint.on_failure == "stop":
            is_full = any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT))
            remedy = "free some space" if is_full else f"make {run.checkpoints_dir} writable"
            raise RunStoppedError(f"{problem}; {remedy} and rerun")
        if self.log:
            echo(f"{problem}; training continues", to_stderr=True)

    def exit_on_signal(self) -> None:
        """Wait for the checkpoint; raise SavedInterrupt after Ctrl-C, and RunStoppedError after other signals."""
        self.wait_for_checkpoint(is_last=True)
        name = self.signals.names[-1] if self.signals.names else "a signal to another rank"
        message = "saved a checkpoint; rerun the same command"
        if name == "SIGINT":
            raise SavedInterrupt(f"Ctrl-C: {message}")
        raise RunStoppedError(f"{name}: {message}", signal=name)

    def _on_interrupt(self) -> None:
        """Print what Ctrl-C causes; the thread of `record_signals` calls this method."""
        if self.log:
            what = f"finishing step {self.stop_step:,} and saving a checkpoint"
            echo(f"Ctrl-C: {what}; press it again to abort", to_stderr=True)

    def _on_hang(self, seconds: float) -> None:
        """Log a hang of `seconds`; the watchdog's thread calls this method on each rank that hangs."""
        rank, limit = self.state.world.rank, self.state.recipe.guard.watchdog_seconds
        RunLog(self.state.run).event("hang", self.step + 1, rank=rank, seconds=seconds)
        cause = "guard.watchdog_seconds" if seconds == limit else "the limit after a stop signal"
        echo(f"rank {rank}: no step ended within {cause} ({seconds:g} s); exiting", to_stderr=True)


def _check_token_ids(state: TrainState, sequences: Tensor) -> None:
    """Raise InputError if a damaged store has token ids outside the vocabulary."""
    if (largest := int(sequences.max())) >= state.model.vocab_size:
        folder = state.store.folder
        problem = f"token id {largest} is outside the vocabulary of {state.model.vocab_size}"
        raise InputError(f"{folder}: {problem}; find the damaged file with `tinyllama inspect {folder} --verify`")


def forward_backward(
    state: TrainState,
    sequences: Tensor,
    heartbeat: Callable[[], None] = lambda: None,
    loss_scale: float = 1.0,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the clipped gradient of a batch; see `Batch` for `sequences` and `document_starts` of this rank.

    Returns the cross-entropy in nats, summed over this rank's tokens (float64), and the norm over all ranks of the
    gradient before clipping. `heartbeat` is called after each micro-batch. `loss_scale` multiplies the loss in the
    backward pass, and the gradient is divided by it before clipping. If a gradient overflows, the norm is not finite.
    """
    recipe, world = state.recipe.train, state.world
    total = torch.zeros((), device=world.device, dtype=torch.float64)
    size = recipe.effective_micro_batch_size(world.size)
    micro_batches = _to_device(sequences, world.device).split(size)
    starts = [None] * len(micro_batches)
    if document_starts is not None:
        starts = _to_device(document_starts, world.device).split(size)
    with kept_cast_weights(state.model, state.keeps_weights):
        for number, (micro_batch, own_starts) in enumerate(zip(micro_batches, starts, strict=True), 1):
            begin_micro_batch(state.model, number == len(micro_batches), state.keeps_weights)
            ids, targets = micro_batch[:, :-1], micro_batch[:, 1:]
            nats = state.model.loss(ids, targets, recipe.z_loss, document_starts=own_starts)
            # FSDP averages gradients over the ranks, but the loss is a sum over the ranks; the factor corrects this.
            (nats * (loss_scale * world.size / recipe.batch_tokens)).backward()
            total += nats.detach()
            heartbeat()
    return total, clip_grad_norm(state.model, recipe.optimizer.max_gradient_norm, loss_scale)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the rank's device; pinned memory is copied while the GPU computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _progress_bar(recipe: Recipe, run: RunDir, first_step: int) -> Bar:
    where = f"`tinyllama watch {run.path}` shows it"
    label, steps, each = f"training {recipe.name}", recipe.train.steps, recipe.train.batch_tokens
    return Bar(label, steps, "steps", first_step, rate="tokens", each=each, where=where)
