"""Comparison of checkpoint averages with a learning-rate cool-down, by validation loss of the demo's earlier recipe.

    python benchmarks/averaging.py [--steps 375] [--folder DIR]

Two runs of the demo's earlier recipe (benchmarks/ablation.py) use equal initial weights and equal batches. One run has
a constant learning rate and a checkpoint every 25 steps, and the script scores averages of these checkpoints. The other
run cools down over its last 40 % of steps. The default folder is that of benchmarks/ablation.py. Interrupted runs
resume.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from ablation import EARLIER, flags, make_data, tinyllama

from tinyllama.data.store import TokenStore
from tinyllama.distributed import World
from tinyllama.loading import load_model
from tinyllama.model.llama import PRECISIONS
from tinyllama.recipe import Recipe
from tinyllama.release.release import averaged_checkpoints, load_average
from tinyllama.runs.run_dir import CheckpointDir, RunDir
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.validation import ValidationScore, ValidationSet, load_validation_set, validate

EVERY = 25
AVERAGES = ((1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (8, 0.8), (8, 0.5))
"""Averages to score: number of checkpoints, and decay."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=375, help="steps of each run (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/tinyllama-benchmarks/demo")
    chosen = parser.parse_args()
    make_data(chosen.folder)
    demo = Recipe.load("demo", EARLIER)
    peak = {"train.schedule.final_learning_rate": demo.train.optimizer.learning_rate}
    cooled = train(chosen.folder, f"cooled-{chosen.steps}", chosen.steps, {})
    constant = train(chosen.folder, f"constant-{chosen.steps}", chosen.steps, peak)
    validation = validation_of(chosen.folder, constant)
    print("| weights | validation loss | bits per byte | less than the last |\n|---|---|---|---|", flush=True)
    last = score([RunDir(constant).find_checkpoint()], 1.0, validation).loss
    for count, decay in AVERAGES:
        checkpoints = averaged_checkpoints(RunDir(constant).find_checkpoint(), count)
        print_row(name_of(count, decay), score(checkpoints, decay, validation), last)
    print_row("cool-down instead", score([RunDir(cooled).find_checkpoint()], 1.0, validation), last)


def train(folder: Path, name: str, steps: int, fields: Mapping[str, object]) -> Path:
    """Train the demo's earlier recipe for `steps` steps with changed fields; return the run's folder."""
    changes: dict[str, object] = {
        **EARLIER,
        "name": name,
        "train.tokens": steps * Recipe.load("demo", EARLIER).train.batch_tokens,
        "checkpoint.every_steps": EVERY,
        "checkpoint.keep": max(count for count, _ in AVERAGES),
        **fields,
    }
    tinyllama(folder, "train", "demo", *flags(changes))
    return folder / "runs" / name


def validation_of(folder: Path, run: Path) -> ValidationSet:
    """Return the validation sequences of the run."""
    recipe = Recipe.load(run / "recipe.yaml")
    validation = load_validation_set(
        recipe, TokenStore.open(folder / recipe.data.store), Tokenizer.load(run / "tokenizer")
    )
    assert validation is not None
    return validation


def score(checkpoints: Sequence[CheckpointDir], decay: float, validation: ValidationSet) -> ValidationScore:
    """Return the validation score of the checkpoints' average, in the precision of training."""
    train = Recipe.load("demo").train
    model = load_model(checkpoints[-1].path, PRECISIONS[train.precision])
    load_average(model, checkpoints, decay)
    return validate(model, validation, train.micro_batch_sequences, World(0, 1, torch.device("cpu")))


def name_of(count: int, decay: float) -> str:
    if count == 1:
        return "the last checkpoint"
    how = "mean" if decay == 1 else f"exponential mean, decay {decay:g},"
    return f"{how} of the last {count}"


def print_row(name: str, found: ValidationScore, last: float) -> None:
    print(f"| {name} | {found.loss:.4f} | {found.bits_per_byte:.4f} | {last - found.loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
