"""The training loop: next batch, forward and backward, check, update, log, maybe validate and save.

Reads the token store and the tokenizer, writes `runs/NAME/`. Nothing but the step decides what is read, so going on
after an interruption is loading the newest whole checkpoint and counting on.
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama import hardware, plan
from tinyllama.data.batches import batches, rank_slice
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.files import alone_in, read_json, write_atomically
from tinyllama.model.llama import PRECISIONS, Llama, initialize
from tinyllama.progress import Bar
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer
from tinyllama.train import checkpoint
from tinyllama.train.metrics import Journal, Tracker
from tinyllama.train.optimizer import build_optimizer, clip_gradient, set_learning_rate
from tinyllama.train.parallel import Ranks, join_ranks, shard, sum_over_ranks
from tinyllama.train.schedule import learning_rate
from tinyllama.train.validation import Validation, prepare_validation, unvalidated, validate


@dataclass
class Trainer:
    """What a step needs, put together once."""

    recipe: Recipe
    store: TokenStore
    tokenizer: Tokenizer
    ranks: Ranks
    run: Path
    model: Llama
    optimizer: torch.optim.Optimizer
    validation: Validation | None


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's run lies."""
    return Path("runs") / recipe.name


def train(recipe: Recipe, *, allow_change: bool = False) -> Path:
    """Train the recipe's model, going on where its run stands, and return the run's folder.

    Raises InputError where the store, the tokenizer, the ranks or an earlier part of the run do not fit the recipe.
    """
    hardware.keep_memory()
    with join_ranks() as ranks, ExitStack() as stack:
        trainer = build(recipe, ranks)
        if ranks.is_first:
            stack.enter_context(alone_in(trainer.run, "lock", f"{trainer.run}: another process is training this run"))
        journal = Journal(trainer.run) if ranks.is_first else None
        first_step = _resume(trainer, journal, allow_change)
        if ranks.is_first:
            _write_run_folder(trainer)
        if first_step < recipe.train.steps:
            _train_on(trainer, journal, first_step)
        return trainer.run


def build(recipe: Recipe, ranks: Ranks) -> Trainer:
    """Open the store and build the model, the same initial weights on any number of ranks."""
    store = TokenStore.open(recipe.data.store)
    tokenizer = Tokenizer.load(recipe.tokenizer)
    if store.manifest["tokenizer"]["digest"] != tokenizer.digest:
        raise InputError(
            f"{recipe.tokenizer}: not the tokenizer that {recipe.data.store} was made with; "
            "name that one in `tokenizer`, or prepare another store"
        )
    rank_slice(recipe, ranks.rank, ranks.count)  # refuses a batch that the ranks cannot share
    model = Llama(recipe.model, tokenizer.vocab_size, PRECISIONS[recipe.train.precision])
    initialize(model, recipe.seed)
    model.to(ranks.device)
    shard(model, ranks)
    if recipe.train.compile:
        _compile(model, ranks)
    optimizer = build_optimizer(model, recipe.train.optimizer)
    validation = prepare_validation(recipe, store, tokenizer)
    if ranks.is_first:
        for name in unvalidated(recipe, store):
            print(
                f"{recipe.data.store}/{name}: too little held out to validate on; raise data.holdout", file=sys.stderr
            )
    return Trainer(recipe, store, tokenizer, ranks, run_folder(recipe), model, optimizer, validation)


def _compile(model: Llama, ranks: Ranks) -> None:
    """Compile block by block: one graph serves all, and the embedding's backward, which would not repeat, stays out."""
    if hardware.can_compile(ranks.device):
        for block in model.blocks:
            block.compile()
    elif ranks.is_first:
        print("no C++ compiler with Python's headers here: training goes on uncompiled, and slower", file=sys.stderr)


def train_step(trainer: Trainer, step: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Do step `step` with this rank's rows of its batch, int64 [rows, sequence_length + 1].

    Returns the mean loss over all tokens of the whole batch and the gradient's norm before clipping.
    """
    recipe, ranks = trainer.recipe.train, trainer.ranks
    set_learning_rate(trainer.optimizer, _rate(trainer.recipe, step))
    total = torch.zeros((), device=ranks.device)
    for part in rows.to(ranks.device).split(_pass_rows(trainer)):
        logits = trainer.model(part[:, :-1])
        nats = F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum")
        # FSDP means gradients over the ranks; the loss is a sum over them, hence the factor.
        (nats * (ranks.count / recipe.batch_tokens)).backward()
        total += nats.detach()
    norm = clip_gradient(trainer.model, recipe.optimizer.clip_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return sum_over_ranks(total, ranks) / recipe.batch_tokens, norm


def micro_batch_rows(rows: int, most: int) -> int:
    """The largest number up to `most` that divides a rank's rows: every pass has one shape, which is compiled once."""
    return next(count for count in range(min(rows, most), 0, -1) if rows % count == 0)


def _pass_rows(trainer: Trainer) -> int:
    recipe = trainer.recipe.train
    return micro_batch_rows(recipe.batch_sequences // trainer.ranks.count, recipe.micro_batch_sequences)


def _rate(recipe: Recipe, step: int) -> float:
    return learning_rate(recipe.train.schedule, recipe.train.optimizer.learning_rate, step, recipe.train.steps)


def _train_on(trainer: Trainer, journal: Journal | None, first_step: int) -> None:
    recipe, ranks, steps = trainer.recipe, trainer.ranks, trainer.recipe.train.steps
    meter = Meter(trainer)
    with ExitStack() as stack:
        bar = stack.enter_context(Bar(f"training {recipe.name}", steps, first_step)) if journal else None
        tracker = stack.enter_context(Tracker(recipe, trainer.run, journal, first_step)) if journal else None
        for step, rows in enumerate(batches(recipe, trainer.store, first_step, ranks.rank, ranks.count), first_step):
            loss, norm = train_step(trainer, step, rows)
            row = meter.row(step, float(loss), float(norm))
            done = step + 1
            if trainer.validation and (done % recipe.train.validate_every_steps == 0 or done == steps):
                score = validate(trainer.model, trainer.validation, _pass_rows(trainer), ranks)
                row |= {"validation_loss": score.loss, "validation_bits_per_byte": score.bits_per_byte}
                meter.restart()
            if journal and bar and tracker:
                journal.metrics(row)
                tracker.log(row)
                bar.show(done, _words(row))
            if done % recipe.checkpoint.every_steps == 0 or done == steps:
                _save(trainer, journal, done)
                meter.restart()


def _words(row: dict[str, Any]) -> str:
    share = f", MFU {100 * row['mfu']:.0f} %" if row["mfu"] else ""
    return f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s{share}"


class Meter:
    """Times the steps; what happens between `restart` and the step before it is not a step's time."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        recipe = trainer.recipe
        vocab = trainer.tokenizer.vocab_size
        self.flops = plan.flops_per_token(recipe.model, vocab, recipe.train.sequence_length)
        self.restart()

    def restart(self) -> None:
        """Begin to time the next step now; a CPU's peak is measured anew, since neighbours come and go."""
        self.peak = hardware.peak_flops(self.trainer.ranks.device, PRECISIONS[self.trainer.recipe.train.precision])
        self.begun = time.perf_counter()

    def row(self, step: int, loss: float, norm: float) -> dict[str, Any]:
        """The row of metrics of the step that just ended."""
        train, ranks = self.trainer.recipe.train, self.trainer.ranks
        speed = train.batch_tokens / (time.perf_counter() - self.begun)
        self.begun = time.perf_counter()
        return {
            "step": step + 1,
            "tokens": (step + 1) * train.batch_tokens,
            "loss": loss,
            "learning_rate": _rate(self.trainer.recipe, step),
            "gradient_norm": norm,
            "tokens_per_second": speed,
            "mfu": speed * self.flops / (self.peak * ranks.count) if self.peak else None,
            "memory_bytes": hardware.memory_bytes(ranks.device),
        }


def _save(trainer: Trainer, journal: Journal | None, step: int) -> None:
    recipe = trainer.recipe
    if journal:
        journal.flush_to_disk()
    begun = time.perf_counter()
    state = {
        "tokens": step * recipe.train.batch_tokens,
        "digest": recipe.digest,
        "fields": recipe.weight_fields(),
        "store": trainer.store.digest,
        "tokenizer": trainer.tokenizer.digest,
        "ranks": trainer.ranks.count,
    }
    checkpoint.save(trainer.run, step, trainer.model, trainer.optimizer, state)
    if journal:
        checkpoint.retain(trainer.run, recipe.checkpoint.keep)
        journal.event("checkpoint", step, seconds=round(time.perf_counter() - begun, 3))


def _resume(trainer: Trainer, journal: Journal | None, allow_change: bool) -> int:
    """Put the newest whole checkpoint in place and return the step to go on with, 0 without one."""
    damaged: list[Path] = []
    for folder in reversed(checkpoint.committed(trainer.run)):
        step = checkpoint.step_of(folder)
        damage = checkpoint.problems(folder)
        if damage:
            if journal:  # its place among the newest belongs to what can be resumed from
                print(f"{damage[0]}; going on from an older checkpoint", file=sys.stderr)
                journal.event("checkpoint-damaged", step, problem=damage[0])
                damaged.append(folder)
            continue
        _refuse_change(trainer, read_json(folder / "state.json"), folder, allow_change)
        checkpoint.load(folder, trainer.model, trainer.optimizer)  # all ranks have looked at the others by now
        for other in damaged:
            checkpoint.delete(other)
        if journal:
            journal.cut_back(step)
            journal.event("resume", step, ranks=trainer.ranks.count)
        return step
    if journal:
        journal.cut_back(0)
        journal.event("start", 0, ranks=trainer.ranks.count)
    return 0


def _refuse_change(trainer: Trainer, state: dict[str, Any], folder: Path, allow_change: bool) -> None:
    then, now = state["fields"], trainer.recipe.weight_fields()
    then |= {"data.store (its content)": state["store"], "tokenizer (its content)": state["tokenizer"]}
    now |= {
        "data.store (its content)": trainer.store.digest,
        "tokenizer (its content)": trainer.tokenizer.digest,
    }
    changed = [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(then | now)
        if then.get(key) != now.get(key)
    ]
    shape = [change for change in changed if change.startswith(("model.", "tokenizer "))]
    if shape or (changed and not allow_change):
        also = "" if shape else ", or --allow-change to go on with this recipe"
        raise InputError(f"{folder}: made by another recipe: {'; '.join(changed)}; give the run another name{also}")


def _write_run_folder(trainer: Trainer) -> None:
    """Put into the run what a release or a stranger needs to use it without the recipe's other folders."""
    with write_atomically(trainer.run / "recipe.yaml") as file:
        file.write(trainer.recipe.to_yaml().encode())
    with write_atomically(trainer.run / "store.json") as file:
        file.write((trainer.store.folder / "manifest.json").read_bytes())
    trainer.tokenizer.save(trainer.run / "tokenizer", trainer.recipe.model.context)
