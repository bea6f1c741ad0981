"""Recipes: YAML files that describe a run, as frozen pydantic models with the default and check of each field.

A field's docstring is its description in docs/recipe.md. `data_schema` has the fields of `data`. `model_schema` has
those of `model`. `run_schema` has those of the parts after `train`.

A recipe's digest covers the fields that change the trained weights beyond rounding. A run compares digests on resume.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from tinyllama.errors import InputError
from tinyllama.recipe.data_schema import SLIMPAJAMA_SUBSETS, Cleaning, Data, Source, TokenizerKind
from tinyllama.recipe.loading import (
    NAME_PATTERN,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Origin,
    Positive,
    PositiveFraction,
    RecipeModel,
    Strings,
    TokenCount,
    bundled_recipes,
    differences,
    flatten,
    format_validation_error,
    read_fields,
)
from tinyllama.recipe.model_schema import Model, RopeScaling
from tinyllama.recipe.run_schema import ActivationCheckpointing, Checkpoint, Guard, Parallel, Release, Track

__all__ = [
    "SLIMPAJAMA_SUBSETS", "ActivationCheckpointing", "Cleaning", "Guard", "Model", "Optimizer", "Parallel", "Recipe",
    "Release", "RopeScaling", "Schedule", "Source", "TokenizerKind", "Track", "bundled_recipes", "differences",
    "flatten",
]  # fmt: skip


class Optimizer(RecipeModel):
    """Optimizer; weight decay applies to matrices only."""

    name: Literal["adamw", "muon"] = "adamw"
    """`adamw`: AdamW for all parameters. `muon`: Muon for the transformer blocks' matrices, with updates scaled to the
    size of AdamW's updates, and AdamW for the other parameters."""
    learning_rate: Positive
    """Peak learning rate."""
    embedding_learning_rate: Positive | None = None
    """Peak learning rate of the embedding and the output head, with the shape of the schedule; null means
    `learning_rate`."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the running mean and the running mean square of gradients."""
    momentum: Fraction = 0.95
    """Muon's momentum."""
    newton_schulz_steps: Count | None = None
    """Number of iterations of Muon's orthogonalization; null means 5. Three take less time and are less exact."""
    normalize_rows: bool = False
    """Scale the rows of each update of Muon to equal norms."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay per step, multiplied by the learning rate."""
    max_gradient_norm: Positive = 1.0
    """Gradient-norm clipping threshold."""


class Schedule(RecipeModel):
    """Learning-rate schedule: warm-up and cosine decay, or warm-up, a constant rate and a final decay (WSD)."""

    name: Literal["cosine", "wsd"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: CountOrZero
    """Steps of linear warm-up to the peak."""
    final_learning_rate: NonNegative
    """Learning rate at the last step, at most the peak."""
    decay_fraction: PositiveFraction = 0.2
    """For WSD only: length of the final decay, as a fraction of all steps."""


class Train(RecipeModel):
    """Training."""

    tokens: TokenCount
    """Number of tokens to train on."""
    sequence_length: Count
    """Number of predicted tokens per sequence."""
    batch_sequences: Count
    """Global batch size per step, over all ranks."""
    micro_batch_sequences: Count
    """Maximum micro-batch size per rank. The largest divisor of the rank's batch size up to this maximum is used."""
    initial_weights: str | None = None
    """Folder or hub name of a Hugging Face Llama with the initial weights; null initializes weights randomly."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of computation; weights, optimizer state and accumulated gradients are always float32. `fp16`, with
    loss scaling, is for GPUs that do not support bf16."""
    float8: bool = False
    """Compute the transformer blocks' matrix products in float8 with one scale per row (torchao); needs `compile`, and
    a GPU that supports float8 matrix products."""
    deterministic: bool = False
    """Use deterministic GPU kernels, which are slower; CPU kernels are always deterministic."""
    compile: bool = True
    """Compile the transformer blocks with torch.compile."""
    z_loss: NonNegative = 0.0
    """Weight of the z-loss, the mean squared log-sum-exp of the logits, which keeps the logits from drifting."""
    document_mask: bool = False
    """Let no token attend to the documents before its own in the same sequence, in training and in validation."""
    optimizer: Optimizer
    """Optimizer and its hyperparameters."""
    schedule: Schedule
    """Learning-rate schedule."""
    validate_every_steps: Count = 1000
    """Number of steps between validations; the last step is always validated."""
    validation_sequences: Count = 1024
    """Maximum number of sequences per validation, divided among the sources by weight."""
    sample_prompts: Strings | None = None
    """Prompts that the model completes at each validation; null means the beginnings of three validation documents, and
    `[]` means none."""
    evaluate_every_steps: Count | None = None
    """Number of steps between evaluations on `evaluate_tasks`, on all ranks; the last step is always evaluated. Null
    means no evaluation during training."""
    evaluate_tasks: Annotated[Strings, Field(min_length=1)] = ("hellaswag",)
    """Tasks of lm-eval for evaluations during training."""
    evaluate_limit: Annotated[int, Field(ge=2)] | None = 500
    """Maximum number of items per task in evaluations during training, from the task's first item on; null means all
    items."""

    @model_validator(mode="after")
    def _check_float8(self) -> Self:
        if self.float8 and self.precision == "fp16":
            raise ValueError("float8 with precision fp16 is not supported; use precision bf16, or remove float8")
        if self.float8 and not self.compile:
            problem = "float8 needs compile, because each scale and cast would otherwise be a kernel of its own"
            raise ValueError(f"{problem}; set compile to true, or remove float8")
        return self

    @model_validator(mode="after")
    def _check_learning_rates(self) -> Self:
        peak, final = self.optimizer.learning_rate, self.schedule.final_learning_rate
        if final > peak:
            raise ValueError(
                f"schedule.final_learning_rate {final:g} is above the peak, optimizer.learning_rate {peak:g}; lower it"
            )
        return self

    @property
    def evaluated_tasks(self) -> tuple[str, ...]:
        """Tasks that are evaluated during training; empty without evaluation."""
        return self.evaluate_tasks if self.evaluate_every_steps else ()

    @property
    def batch_tokens(self) -> int:
        """Number of tokens per step."""
        return self.batch_sequences * self.sequence_length

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the run; the last step reaches `tokens`."""
        return -(-self.tokens // self.batch_tokens)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0.

        The rate rises linearly to the peak during the warm-up. `cosine` then follows half a cosine to the final rate at
        the last step (Loshchilov and Hutter 2016, arXiv:1608.03983). `wsd` stays at the peak and decays linearly over
        the last `decay_fraction` of the steps (Hu et al. 2024, arXiv:2404.06395; linear as in Hägele et al. 2024,
        arXiv:2405.18392).
        """
        schedule, peak, last_step = self.schedule, self.optimizer.learning_rate, self.steps - 1
        warmup, final = schedule.warmup_steps, schedule.final_learning_rate
        rate = peak * (step + 1) / warmup if step < warmup else peak
        if schedule.name == "cosine":
            if step < warmup:
                return rate
            progress = (step - warmup) / max(1, last_step - warmup)
            return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        decay_steps = max(1, round(schedule.decay_fraction * self.steps))
        # In a short run the decay may begin during the warm-up. The lower of the two rates then applies.
        return min(rate, final + (peak - final) * min(1.0, max(0.0, (last_step - step) / decay_steps)))

    def sequences_per_rank(self, ranks: int) -> int:
        """Return the batch size of each rank. Raises InputError if the batch is not divisible by `ranks`."""
        if self.batch_sequences % ranks:
            raise InputError(
                f"train.batch_sequences: {self.batch_sequences} sequences do not divide among {ranks} ranks; choose a "
                f"multiple of {ranks}, or another number of ranks"
            )
        return self.batch_sequences // ranks

    def effective_micro_batch_size(self, ranks: int) -> int:
        """Return the largest micro-batch size that divides a rank's batch, so that all passes have the same shape."""
        size = self.sequences_per_rank(ranks)
        return next(count for count in range(min(size, self.micro_batch_sequences), 0, -1) if size % count == 0)


class Recipe(RecipeModel):
    """A complete run, from raw text to releases."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the run's folder and its releases."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    """Seed of the initial weights and the data order."""
    tokenizer: str
    """Folder, file or hub name of the tokenizer."""
    vocab_size: Count | None = None
    """Vocabulary size of a tokenizer that `tokenizer train` trains; null means 8192. An existing tokenizer keeps its
    size."""
    tokenizer_kind: TokenizerKind = "llama2"
    """Kind of tokenizer that `tokenizer train` trains."""
    data: Data
    """Text sources and the token store."""
    model: Model
    """Shape of the model."""
    train: Train
    """Training."""
    parallel: Parallel = Parallel()
    """Distribution over ranks."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints."""
    guard: Guard = Guard()
    """Response to loss spikes, non-finite steps and stalls."""
    release: Release = Release()
    """Milestones and releases."""
    track: Track = Track()
    """Experiment trackers."""
    _origin: Origin = Origin()

    @model_validator(mode="after")
    def _check_across_parts(self) -> Self:
        if self.train.sequence_length > self.model.context_length:
            raise ValueError(
                f"train.sequence_length {self.train.sequence_length} is longer than "
                f"model.context_length {self.model.context_length}; reduce the sequence length"
            )
        if self.release.average_checkpoints > self.checkpoint.keep:
            raise ValueError(
                f"release.average_checkpoints {self.release.average_checkpoints} is more than "
                f"checkpoint.keep {self.checkpoint.keep}; keep as many checkpoints as a release averages"
            )
        return self

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, object] | None = None) -> "Recipe":
        """Read a recipe from a YAML file or by the name of a bundled recipe.

        `overrides` replaces single fields by their dotted names: `{"train.tokens": "5M"}`.
        Raises InputError with the file or the override, the field, the value and the remedy.
        """
        fields = read_fields(str(source), overrides or {})
        try:
            recipe = cls.model_validate(fields)
        except ValidationError as error:
            message = format_validation_error(error, cls)
            is_override = any(re.match(rf"{re.escape(name)}[.:]", message) for name in overrides or {})
            raise InputError(f"--{message}" if is_override else f"{source}: {message}") from None
        recipe._origin = Origin(str(source), dict(overrides or {}))
        return recipe

    def command(self, name: str) -> str:
        """Return a shell command, ready to paste, that calls the command `name` with this recipe and its overrides.

        For example, `recipe.command("prepare")` is `tinyllama prepare mine.yaml --train.tokens 20M`. A recipe that was
        not loaded is given by its name.
        """
        return self._origin.command(name, self.name)

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Return the names and values in the representation of the recipe; all fields would fill a page."""
        shape = f"{self.model.layers} layers of width {self.model.dim}"
        return [("name", self.name), ("model", shape), ("tokens", self.train.tokens)]

    @property
    def has_milestones(self) -> bool:
        """Whether the recipe has milestones."""
        return bool(self.release.at_tokens or self.release.every_tokens)

    def milestone_steps(self) -> set[int]:
        """Return the steps, counted from 1, that reach a milestone of `release.at_tokens` or `release.every_tokens`."""
        batch, last, every = self.train.batch_tokens, self.train.steps, self.release.every_tokens
        tokens = {*self.release.at_tokens, *(range(every, last * batch + 1, max(every, batch)) if every else ())}
        return {step for step in (-(-count // batch) for count in tokens) if step <= last}

    def to_yaml(self) -> str:
        """Return the recipe as YAML, including defaults."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def fields_affecting_weights(self) -> dict[str, Any]:
        """Return the value of each field that changes the weights beyond rounding, by dotted name."""
        fields = flatten(self.model_dump(mode="json"))
        kept = {
            name: value
            for name, value in fields.items()
            if not (_FIELDS_NOT_AFFECTING_WEIGHTS.match(name) or (not value and _LATER_FIELDS.match(name)))
        }
        return kept | {"data.sources": list(self.data.sources)}  # the data order depends on the order of the sources

    @property
    def digest(self) -> str:
        """SHA-256 of `fields_affecting_weights` in hexadecimal."""
        return hashlib.sha256(json.dumps(self.fields_affecting_weights(), sort_keys=True).encode()).hexdigest()


# Fields for locations, names, parallelism, monitoring and storage do not change the weights beyond rounding.
_FIELDS_NOT_AFFECTING_WEIGHTS = re.compile(
    r"name$|tokenizer(_kind)?$|vocab_size$|data\.(store|workers|executor|slurm.*|sources\.[^.]+\.(path|max_compression_ratio))$"
    r"|checkpoint\.|release\.|track\."
    r"|train\.(micro_batch_sequences|deterministic|compile|validate_every_steps|validation_sequences|sample_prompts)$"
    r"|train\.evaluate_(every_steps|tasks|limit)$"
    r"|parallel\.|guard\.(watchdog_seconds|max_rollbacks)$"
)
# Without a value, these fields are omitted, so that checkpoints of versions without them still belong to the recipe.
_LATER_FIELDS = re.compile(
    r"train\.document_mask$|train\.optimizer\.(embedding_learning_rate|newton_schulz_steps|normalize_rows)$"
    r"|model\.(head_dim|rope_scaling)$|data\.sources\.[^.]+\.min_tokens$"
)
