"""The parts of a recipe that say how a model is trained, shared out, saved, guarded, released and watched."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tinyllama.errors import InputError
from tinyllama.recipe.fields import Count, Positive, RecipeModel, Share, Tokens


class Optimizer(RecipeModel):
    """The update rule; weight decay on matrices only."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon for the blocks' matrices, its updates scaled to AdamW's, with AdamW for everything else."""
    learning_rate: Positive
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's decay of the running mean and of the running square."""
    momentum: Share = 0.95
    """Muon only: the decay of its running sum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay a step, times the learning rate."""
    max_gradient_norm: Positive = 1.0
    """Largest global norm of the gradient."""


class Schedule(RecipeModel):
    """The learning rate over the run: warm-up, then cosine; or warm-up, stable, decay (WSD)."""

    name: Literal["cosine", "wsd"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps of linear rise to the peak."""
    final_learning_rate: Annotated[float, Field(ge=0)]
    """Learning rate at the last step, at most the peak."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """WSD only: the share of all steps over which it falls at the end."""


class Train(RecipeModel):
    """How the model is trained."""

    tokens: Tokens
    """Tokens to train on, over the whole run."""
    sequence_length: Count
    """Tokens a row that the model predicts."""
    batch_sequences: Count
    """Rows of a step's whole batch, over all ranks."""
    micro_batch_sequences: Count
    """Rows that one rank puts through the model at a time, at most: the largest divisor of its rows is taken."""
    initial_weights: str | None = None
    """A Hugging Face Llama's folder or hub name whose weights the first step starts from; null draws them anew."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the computation; weights, optimiser state and gradient sums are always float32."""
    float8: bool = False
    """Multiply the blocks' matrices in float8, scaled a row at a time (torchao); for GPUs that have it."""
    deterministic: bool = False
    """On GPUs, take kernels that give the same bits every time, which are slower; a CPU's do anyway."""
    compile: bool = True
    """Compile the blocks with torch.compile."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Times the mean square of the logits' log-sum, added to what is minimised: keeps logits from drifting."""
    optimizer: Optimizer
    """The update rule and its constants."""
    schedule: Schedule
    """The learning rate over the run."""
    validate_every_steps: Count = 1000
    """Steps between two validations; the last step is always validated."""
    validation_sequences: Count = 1024
    """Rows of a validation at most, over all sources, shared out by their weights."""

    @model_validator(mode="after")
    def _rate_falls(self) -> Self:
        peak, final = self.optimizer.learning_rate, self.schedule.final_learning_rate
        if final > peak:
            raise ValueError(
                f"schedule.final_learning_rate {final:g} is above the peak, optimizer.learning_rate {peak:g}; lower it"
            )
        return self

    @property
    def batch_tokens(self) -> int:
        """Tokens a step."""
        return self.batch_sequences * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the run: the last one reaches `tokens`."""
        return -(-self.tokens // self.batch_tokens)

    def sequences_per_rank(self, ranks: int) -> int:
        """Rows of a step's batch that each of so many ranks has. Raises InputError where they do not divide."""
        if self.batch_sequences % ranks:
            rows = self.batch_sequences
            raise InputError(
                f"train.batch_sequences: {rows} rows do not divide among {ranks} ranks; choose a multiple of {ranks}, "
                "or another number of ranks"
            )
        return self.batch_sequences // ranks

    def effective_micro_batch_size(self, ranks: int) -> int:
        """The most rows at a time that divide a rank's: every pass has one shape, which is compiled once."""
        rows = self.sequences_per_rank(ranks)
        return next(count for count in range(min(rows, self.micro_batch_sequences), 0, -1) if rows % count == 0)


class Parallel(RecipeModel):
    """How the model is shared out among the ranks of a torchrun; one process alone holds it whole."""

    shard: Count | Literal["auto"] = "auto"
    """Ranks that hold the weights between them, such as the GPUs of one node; `auto`: all / replicate."""
    replicate: Count = 1
    """Groups of such ranks, each with all of the weights; above 1 it is hybrid sharding (HSDP)."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: nothing, all but products of matrices, or all but each block's input."""

    def mesh(self, ranks: int) -> tuple[int, int]:
        """Groups that replicate, ranks that shard in each. Raises InputError where they do not make up the ranks."""
        shard = ranks // self.replicate if self.shard == "auto" else self.shard
        if shard * self.replicate != ranks:
            raise InputError(
                f"parallel: shard {self.shard} x replicate {self.replicate} do not make {ranks} ranks; "
                "change one of them or the number of ranks"
            )
        return self.replicate, shard


class Checkpoint(RecipeModel):
    """When the run can be picked up again."""

    every_steps: Count = 1000
    """Steps between two checkpoints; the last step always makes one."""
    keep: Count = 3
    """Number of newest checkpoints to keep; those of `release.at_tokens` are never pruned."""
    asynchronous: bool = True
    """Go on training while it is written, from a copy in memory (12 bytes a parameter, shared out over the ranks)."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When one cannot be written, such as on a full disk: end the run, or train on and try again at the next."""


class Guard(RecipeModel):
    """What is done about steps that go wrong; the same on every rank, and an event each."""

    spike_window_steps: Annotated[int, Field(ge=8)] = 128
    """Steps whose losses a new one is compared with; no spike is seen before there are that many."""
    spike_z_score: Positive = 6.0
    """Standard deviations above the window's median at which a loss rolls the run back to its last checkpoint."""
    max_skips: Annotated[int, Field(ge=0)] = 3
    """Steps in a row that are skipped for a loss or gradient that is not finite; one more goes back as a spike does."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 3
    """Times that the run goes back to one and the same checkpoint; one more ends it."""
    watchdog_seconds: Positive = 600.0
    """Longest time of a step; a longer one ends the process, so that torchrun or the scheduler starts it again."""


class Release(RecipeModel):
    """Which checkpoints are for others, in which formats, and what they are scored on."""

    at_tokens: tuple[Tokens, ...] = ()
    """Milestones in tokens: the first step that reaches one saves a checkpoint, which is never deleted; a
    sidecar process releases and scores it."""
    every_tokens: Tokens | None = None
    """A milestone every so many tokens, in addition to those of `at_tokens`."""
    formats: tuple[Literal["huggingface", "gguf", "ctranslate2"], ...] = ("huggingface",)
    """What a release holds: Hugging Face always; GGUF for llama.cpp (F16, Q8_0, Q4_K_M); CTranslate2 (int8,
    float32)."""
    tasks: tuple[str, ...] = ("hellaswag",)
    """lm-eval tasks."""
    limit: Count | None = None
    """Items a task at most: the first in the task's order; null means all."""
    baselines: tuple[str, ...] = ()
    """Models to score on the same items once, beside the first milestone: Hugging Face folders or hub names."""
    license: str | None = None
    """What the card's metadata say, in the hub's words, such as apache-2.0; null says nothing."""
    average_checkpoints: Count = 1
    """Checkpoints that a release averages: its own and those before it; `checkpoint.keep` must hold as many."""
    average_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Weight in the average of each checkpoint, times that of the one after it; 1 weighs all alike."""


class Track(RecipeModel):
    """Where a run is shown; metrics.jsonl is written in any case."""

    trackio: bool = True
    """On trackio's page, `tinyllama watch`, from a folder beside the run."""
    wandb: str | None = None
    """In this Weights & Biases project; needs the extra `track`."""
    tensorboard: bool = False
    """In event files under RUN/tensorboard; needs the extra `track`."""
