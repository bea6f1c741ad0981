"""Settings of the peers of benchmarks/quality.py, as fields of the job that benchmarks/quality_peers.py reads.

Defaults are those of the peer's documented interface, except where they cannot work in minutes on a CPU; `text` says
which. With our learning rate, a peer takes the settings of the demo's earlier recipe, which was tuned for AdamW, and
bf16 and compilation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from tinyllama.recipe import Train

NANOCHAT_SHAPE = ("--depth=6", "--aspect-ratio=28", "--head-dim=56")
"""nanochat's shape with as many parameters as the demo's: 6 layers, dim 168, 3 heads."""


class Settings(NamedTuple):
    """A peer's settings."""

    text: str
    """Description of the settings."""
    fields: Callable[[Train, int], dict[str, Any]]
    """Function that returns the job's fields for the recipe's section `train` and the number of steps."""


def litgpt_defaults(_train: Train, steps: int) -> dict[str, Any]:
    """Return the defaults of litgpt's TrainArgs; those of `litgpt pretrain` warm up for 262M tokens."""
    return {
        "batch_sequences": 64,
        "arguments": {"micro_batch_size": 4, "lr_warmup_steps": max(1, min(100, steps // 10))},
        "optimizer": "AdamW",
    }


def litgpt_ours(train: Train, steps: int) -> dict[str, Any]:
    """Return our learning rate and batch size for litgpt, whose cosine ends at our final learning rate."""
    optimizer, schedule = train.optimizer, train.schedule
    return {
        "batch_sequences": train.batch_sequences,
        "arguments": {
            "micro_batch_size": train.effective_micro_batch_size(1),
            "lr_warmup_steps": min(schedule.warmup_steps, steps - 1),
            "min_lr": schedule.final_learning_rate,
        },
        "optimizer": {
            "class_path": "training_peers.FusedAdamW",
            "init_args": {
                "lr": optimizer.learning_rate,
                "betas": optimizer.betas,
                "weight_decay": optimizer.weight_decay,
            },
        },
    }


def transformers_defaults(_train: Train, _steps: int) -> dict[str, Any]:
    """Return the default batch size of TrainingArguments."""
    return {"batch_sequences": 8, "arguments": {}}


def transformers_ours(train: Train, steps: int) -> dict[str, Any]:
    """Return our learning rate and batch size for the Trainer."""
    optimizer = train.optimizer
    arguments = {
        "learning_rate": optimizer.learning_rate,
        "warmup_steps": min(train.schedule.warmup_steps, steps - 1),
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_gradient_norm,
        "bf16": True,
        "torch_compile": True,
    }
    return {"batch_sequences": train.batch_sequences, "arguments": arguments, "attention": "eager"}


def nanochat(batch: int, length: int) -> dict[str, Any]:
    """Return the flags of nanochat's base_train, without evaluations, for batches of `batch` sequences."""
    flags = [*NANOCHAT_SHAPE, f"--max-seq-len={length}", "--window-pattern=L", "--device-type=cpu"]
    flags += [f"--device-batch-size={batch}", f"--total-batch-size={batch * length}"]
    flags += ["--eval-every=-1", "--core-metric-every=-1", "--sample-every=-1"]
    return {"batch_sequences": batch, "arguments": flags, "precision": "bfloat16"}


SETTINGS = {
    "litgpt": Settings(
        "the function that `litgpt pretrain` calls, with its AdamW (learning rate 1e-3), its cosine schedule, and the "
        "defaults of TrainArgs, which are 64 rows per step in micro-batches of 4, final learning rate 6e-5, and 100 "
        "steps of warm-up, here at most 10 % of the steps; bf16-mixed, compiled",
        litgpt_defaults,
    ),
    "litgpt, our learning rate": Settings(
        "as above with the learning rate, betas, weight decay, warm-up, final learning rate and batch size of the "
        "demo's earlier recipe, and fused AdamW",
        litgpt_ours,
    ),
    "transformers": Settings(
        "LlamaForCausalLM and the defaults of TrainingArguments, which are 8 rows per step, learning rate 5e-5 with "
        "linear decay, fused AdamW without weight decay, float32, and no compilation",
        transformers_defaults,
    ),
    "transformers, our learning rate": Settings(
        "as above with the learning rate, betas, weight decay, warm-up and batch size of the demo's earlier recipe, "
        "bf16 and torch_compile",
        transformers_ours,
    ),
    "nanochat": Settings(
        "scripts.base_train with its own architecture (6 layers, dim 168, value embeddings), optimizer and schedule, "
        "and 16,384 tokens per step as in its example for CPUs (runs/runcpu.sh); bfloat16",
        lambda train, steps: nanochat(16_384 // train.sequence_length, train.sequence_length),
    ),
    "nanochat, our batch size": Settings(
        "as above with the batch size of the demo's earlier recipe, to which nanochat adapts its learning rates",
        lambda train, steps: nanochat(train.batch_sequences, train.sequence_length),
    ),
}
"""Settings by name; the part of the name before the comma is the peer."""
