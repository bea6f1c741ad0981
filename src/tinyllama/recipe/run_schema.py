"""Fields of a recipe for the operation of a run: distribution, checkpoints, failures, releases and trackers."""

from typing import Annotated, Literal

from pydantic import Field

from tinyllama.errors import InputError
from tinyllama.recipe.loading import Count, CountOrZero, Positive, PositiveFraction, RecipeModel, TokenCount

ActivationCheckpointing = Literal["none", "selective", "full"]


class Parallel(RecipeModel):
    """Distribution of the model over the ranks of torchrun."""

    shard: Count | Literal["auto"] = "auto"
    """Number of ranks that share one copy of the weights, such as the GPUs of one node; `auto` is the number of all
    ranks divided by `replicate`."""
    replicate: Count = 1
    """Number of groups of ranks, each with a full copy of the weights; values above 1 select hybrid sharding (HSDP)."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Activations that the backward pass recomputes: none, all except matrix products and attention (`selective`), or
    all except each block's input (`full`)."""

    def mesh(self, ranks: int) -> tuple[int, int]:
        """Return the number of groups of ranks (`replicate`) and the number of ranks per group (`shard`).

        Raises InputError if their product is not `ranks`.
        """
        shard = ranks // self.replicate if self.shard == "auto" else self.shard
        if shard * self.replicate != ranks:
            raise InputError(
                f"parallel: shard {self.shard} x replicate {self.replicate} does not equal {ranks} ranks; "
                "change one of these numbers"
            )
        return self.replicate, shard


class Checkpoint(RecipeModel):
    """Checkpoints that a run resumes from."""

    every_steps: Count = 1000
    """Number of steps between checkpoints; the last step always writes a checkpoint."""
    keep: Count = 3
    """Number of newest checkpoints to keep; checkpoints of milestones are never pruned."""
    asynchronous: bool = True
    """Continue training while the checkpoint is written. This needs a copy of the state in host memory: 12 bytes per
    parameter, sharded over the ranks."""
    on_failure: Literal["stop", "continue"] = "stop"
    """Action if a checkpoint cannot be written, for example because the disk is full: stop, or continue until the next
    checkpoint."""


class Guard(RecipeModel):
    """Response to loss spikes, non-finite steps and stalls."""

    spike_window_steps: Annotated[int, Field(ge=8)] = 128
    """Number of previous losses with which a new loss is compared; spike detection starts when they are available."""
    spike_z_score: Positive = 6.0
    """Threshold of spike detection: a loss that is this many standard deviations above the median of the previous
    losses causes a rollback to the last checkpoint."""
    max_skips: CountOrZero = 3
    """Maximum number of consecutive steps skipped for a non-finite loss or gradient; one more causes a rollback."""
    max_rollbacks: CountOrZero = 3
    """Maximum number of rollbacks to the same checkpoint; one more ends the run."""
    watchdog_seconds: Positive = 600.0
    """Maximum duration of a step; a longer step ends the process, so that torchrun or the scheduler restarts it."""


class Release(RecipeModel):
    """Milestones, and the formats and evaluation of releases."""

    at_tokens: tuple[TokenCount, ...] = ()
    """Milestones in tokens. The first step that reaches a milestone writes a checkpoint that is never pruned. A sidecar
    process releases and evaluates this checkpoint."""
    every_tokens: TokenCount | None = None
    """Number of tokens between regular milestones, in addition to `at_tokens`."""
    formats: tuple[Literal["huggingface", "gguf", "ctranslate2"], ...] = ("huggingface",)
    """Formats of a release: `huggingface`, which is always written; `gguf` for llama.cpp (F16, Q8_0, Q4_K_M);
    `ctranslate2` (int8, float32)."""
    tasks: tuple[str, ...] = ("hellaswag",)
    """Evaluation tasks of lm-eval."""
    limit: Count | None = None
    """Maximum number of items per task, from the task's first item on; null means all items."""
    baselines: tuple[str, ...] = ()
    """Folders or hub names of Hugging Face models that the first milestone evaluates on the items of the releases."""
    license: str | None = None
    """License identifier in the model card, such as apache-2.0."""
    average_checkpoints: Count = 1
    """Number of newest checkpoints that a release averages; at most `checkpoint.keep`."""
    average_decay: PositiveFraction = 1.0
    """Weight of each averaged checkpoint relative to the next newer one."""


class Track(RecipeModel):
    """Experiment trackers; metrics.jsonl is always written."""

    trackio: bool = False
    """Export the run to trackio, in the folder `.trackio` next to the run; needs the extra `track`."""
    wandb: str | None = None
    """Weights & Biases project; needs the extra `track`."""
    tensorboard: bool = False
    """Write event files to RUN/tensorboard; needs the extra `track`."""
