"""Rules for the commands of the documentation: which ones run with smaller values, and which ones do not run.

The pages describe runs of days. The tests run the same commands with a tiny model and little data.
"""

import re
from dataclasses import dataclass
from typing import Literal

from tinyllama.recipe import bundled_recipes

STEP = "step-00000008"
"""Last step of every run in these tests; it replaces the steps that the pages name."""
SHAPE = {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 128, "context_length": 64}
TRAINING = {
    **{f"model.{name}": value for name, value in SHAPE.items()},
    "model.norm_eps": 1e-5,
    "model.rope_theta": 10000,
    "model.tie_embeddings": "true",
    "train.sequence_length": 32,
    "train.batch_sequences": 4,
    "train.micro_batch_sequences": 4,
    "train.precision": "fp32",
    "train.compile": "false",
    "parallel.replicate": 1,
    "train.tokens": 8 * 4 * 32,
    "train.schedule.warmup_steps": 2,
    "train.validate_every_steps": 8,
    "train.validation_sequences": 4,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 8,
    "release.at_tokens": "[]",
    "release.every_tokens": "null",
}
ALL_STAGES = {"vocab_size": 600, "release.formats": "[huggingface]", "release.tasks": "[]"}
PREPARING = {"data.workers": 1, "data.executor": "local", "data.validation_fraction": 0.2}


LONGER = {
    "model.context_length": 128,
    "model.rope_theta": 40000,
    "train.sequence_length": 64,
    "train.initial_weights": f"runs/demo/releases/{STEP}/huggingface",
}
"""Fields of `demo-long`, which extends the context of the release that these tests make."""


@dataclass(frozen=True)
class Excluded:
    """Commands that do not run here, with the reason; `parsed` checks their arguments, `skipped` does not."""

    pattern: str
    reason: str
    check: Literal["parsed", "skipped"] = "parsed"


EXCLUDED = (
    Excluded(r"tinyllama plan .*--measure\b", "measures this machine"),
    Excluded(r"tinyllama init\b", "measures this machine; see tests/drafting"),
    Excluded(r"tinyllama run (manuals|mine\.yaml --name)", "does all stages again; the README's `run` is executed"),
    Excluded(r"tinyllama verify runs/(mine|demo-)", "starts every engine again; the demo's release is verified"),
    Excluded(r"tinyllama evaluate runs/demo\b", "reads the tasks again; another page evaluates a run"),
    Excluded(r"make\b", "installs from a registry, or runs all tests"),
    Excluded(r"python benchmarks/", "takes minutes to hours"),
    Excluded(r"python -m pytest\b", "runs other tests of this suite"),
    Excluded(r"(pip|uv)\b", "installs from a registry", "skipped"),
    Excluded(r"pre-commit\b", "changes the checkout", "skipped"),
    Excluded(r"hf download\b", "downloads a terabyte from the hub"),
    Excluded(r"sbatch\b", "needs a cluster; see tests/cluster/test_slurm.py"),
    Excluded(r"kubectl\b", "needs a cluster; see tests/cluster/test_kubernetes.py"),
    Excluded(r"sky\b", "needs a separate environment; `make check-clusters` reads its file"),
)
RECORDED = {"tour.md": "a recording by tools/tour.py; the times and texts differ each time; see test_tour.py"}
"""Pages that do not run, with the reason."""
EXCLUDED_MARK = "excluded:"
"""First word of the line that an excluded command prints."""
PROGRAMS = (
    "tinyllama", "torchrun", "python", "python3", "make", "pip", "uv", "pre-commit", "hf", "sbatch", "kubectl", "sky",
)  # fmt: skip
"""Programs that the fork server runs in place of the installed ones; all others are the system's."""


def exclusion(command: str) -> Excluded | None:
    """Return the rule that excludes a command, if there is one."""
    return next((rule for rule in EXCLUDED if re.match(rule.pattern, command)), None)


def scaled(words: list[str]) -> list[str]:
    """Return the words of a `tinyllama` command with smaller values; fast commands stay unchanged."""
    match words:
        case ["train" | "run" as command, recipe, *_]:
            more = (PREPARING if recipe in bundled_recipes() else {}) | (LONGER if recipe == "demo-long" else {})
            return [*words, *_flags(TRAINING | more | (ALL_STAGES if command == "run" else {}))]
        case ["prepare", recipe, *_] if recipe in (*bundled_recipes(), "continued.yaml"):
            # a model must have the shape of its initial weights, which are tiny here
            own = {"continued.yaml": TRAINING, "demo-long": TRAINING | PREPARING | LONGER}
            return [*words, *_flags(own.get(recipe, PREPARING))]
        case ["tokenizer", "train", *_] if "manuals.yaml" not in words:
            return _with(words, "--vocab-size", "600")
        case ["evaluate", *_]:
            return _with(_with(words, "--limit", "4"), "--precision", "fp32")
        case ["generate", *_]:
            return _with(words, "--max-new-tokens", "8")
    return words


def _flags(fields: dict[str, object]) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def _with(words: list[str], flag: str, value: str) -> list[str]:
    """Return the words with a flag's value replaced, or with the flag added."""
    if flag not in words:
        return [*words, flag, value]
    place = words.index(flag)
    return [*words[: place + 1], value, *words[place + 2 :]]
