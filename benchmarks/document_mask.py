"""Training speed with a document mask, relative to training without one, on the embedded corpus and this machine's CPU.

Each model has 27M parameters (dim 512, 8 layers, 8 heads, 2 key/value heads, FFN 1408, a vocabulary of 4,096 tokens).
It trains in bf16 on 8 sequences of 512 tokens, or on 2 sequences of 2,048 tokens. Steps with and without the mask
alternate in one process, on the same batches and including their reading, so that other jobs slow both equally. With
one thread, the CPU time is measured, which depends less on other jobs.

    python benchmarks/document_mask.py [--rounds 3] [--steps 8] [--threads N] [--folder DIR]
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from ablation import make_data
from measuring import spread

from tinyllama import hardware
from tinyllama.data.batches import Batch, batches
from tinyllama.distributed import World
from tinyllama.recipe import Recipe
from tinyllama.train.loop import forward_backward
from tinyllama.train.setup import TrainState, build, initialize_weights, optimizer_step

MODEL = {"dim": 512, "layers": 8, "heads": 8, "kv_heads": 2, "ffn_dim": 1408, "tie_embeddings": False}
SHAPES = ((8, 512), (2, 2048))


def main() -> None:
    """Print the ratio of the step times for each shape."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3, help="rounds per shape (default: %(default)s)")
    arguments.add_argument("--steps", type=int, default=8, help="steps with and without mask per round (default: 8)")
    arguments.add_argument("--threads", type=int, default=hardware.available_cpu_count(), help="(default: all cores)")
    arguments.add_argument("--folder", type=Path, default=Path.home() / ".cache/tinyllama-benchmarks/demo")
    chosen = arguments.parse_args()
    hardware.tune_malloc()
    torch.set_num_threads(chosen.threads)
    make_data(chosen.folder)
    print("| sequences | documents per sequence | s per step with mask | without | speed with mask / without |")
    print("|---|---|---|---|---|")
    for sequences, length in SHAPES:
        print(row_of_shape(chosen, sequences, length), flush=True)


def row_of_shape(chosen: argparse.Namespace, sequences: int, length: int) -> str:
    """Measure one shape; return a row of the table."""
    recipe = recipe_of_shape(chosen.folder, sequences, length, (chosen.rounds + 1) * chosen.steps)
    state = build(recipe, World(0, 1, torch.device("cpu")))
    initialize_weights(state)
    unmasked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"document_mask": False})})
    streams = {name: batches(each, state.store, 0) for name, each in (("with", recipe), ("without", unmasked))}
    rounds = [time_round(state, streams, chosen.steps) for _ in range(chosen.rounds + 1)][1:]  # the first one compiles
    masked, plain = ([times[name] for times in rounds] for name in streams)
    ratios = spread(other / own for own, other in zip(masked, plain, strict=True))
    documents = statistics.mean(documents_per_sequence(batches(recipe, state.store, 0)))
    return f"| {sequences} x {length} | {documents:.2f} | {spread(masked)} | {spread(plain)} | {ratios} |"


def recipe_of_shape(folder: Path, sequences: int, length: int, steps: int) -> Recipe:
    """Return the recipe with a document mask, whose paths are in `folder`."""
    fields: dict[str, Any] = {f"model.{name}": value for name, value in MODEL.items()}
    fields |= {"model.context_length": length, "train.sequence_length": length, "train.document_mask": True}
    fields |= {"train.batch_sequences": sequences, "train.micro_batch_sequences": sequences}
    fields |= {"train.tokens": steps * sequences * length, "train.validation_sequences": 1}
    demo = folder / "runs/demo"
    fields |= {"tokenizer": str(demo / "tokenizer"), "data.store": str(demo / "store")}
    return Recipe.load("demo", fields)


def time_round(state: TrainState, streams: dict[str, Iterator[Batch]], steps: int) -> dict[str, float]:
    """Return the median time of a step with and without the mask, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in streams}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for number in range(steps):
        for name in list(streams)[:: -1 if number % 2 else 1]:
            begun = clock()
            train_step(state, next(streams[name]))
            times[name].append(clock() - begun)
    return {name: statistics.median(own) for name, own in times.items()}


def train_step(state: TrainState, batch: Batch) -> None:
    """Train on a batch."""
    forward_backward(state, batch.sequences, document_starts=batch.document_starts)
    optimizer_step(state.optimizers, 1e-4)
    state.model.zero_grad()


def documents_per_sequence(stream: Iterator[Batch]) -> Iterator[float]:
    """Yield the number of documents of each sequence."""
    for batch in islice(stream, 50):
        assert batch.document_starts is not None
        yield from (row.unique().numel() for row in batch.document_starts)


if __name__ == "__main__":
    main()
