"""Ablation of the demo's recipe: bits per byte with one setting changed at a time, over seeds.

    python benchmarks/ablation.py [--model demo | 120m] [--seeds 1337 1 2] [--only NAME...] [--train.tokens 1M]

The first row of a table is the recipe, and each other row changes some of its fields. The earlier recipes have
AdamW, with larger batches and more tokens. `120m` is a smaller model with the proportions of tinyllama-120m, on the
demo's text. A seed determines the initial weights and the order of the data. Differences are those of runs with equal
seeds. Other flags are fields of all rows, for trials.

As many runs as there are cores train at a time, with one thread each. This is faster than one run with all cores.
Minutes are those of one core, without the start of the run and without validations. Interrupted runs resume, and
finished runs are not repeated.
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tinyllama.hardware import available_cpu_count
from tinyllama.runs.run_dir import RunDir

EARLIER: dict[str, Any] = {
    "train.tokens": "3M",
    "train.batch_sequences": 32,
    "train.micro_batch_sequences": 32,
    "train.optimizer": {"name": "adamw", "learning_rate": 3e-3},
    "train.schedule.decay_fraction": 0.4,
}
"""Fields of the demo's earlier recipe, which was tuned for AdamW."""
REDUCED: dict[str, Any] = {
    "model": {
        "dim": 384,
        "layers": 12,
        "heads": 6,
        "kv_heads": 2,
        "ffn_dim": 1024,
        "context_length": 512,
        "tie_embeddings": False,
    },
    "train.sequence_length": 512,
    "train.validation_sequences": 256,
}
"""Fields for a model with 22M parameters and the proportions of tinyllama-120m."""
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "demo": {
        "the demo": {},
        "1.3M tokens": {"train.tokens": "1.3M"},
        "earlier recipe": EARLIER,
        "earlier recipe, 1.4M tokens": EARLIER | {"train.tokens": "1.4M"},
        "AdamW": {"train.optimizer.name": "adamw"},
        "16 sequences per step": {"train.batch_sequences": 16, "train.micro_batch_sequences": 16},
        "one learning rate": {"train.optimizer.embedding_learning_rate": 3e-3},
        "rows not normalized": {"train.optimizer.normalize_rows": False},
        "decay over 40 %": {"train.schedule.decay_fraction": 0.4},
        "momentum 0.95": {"train.optimizer.momentum": 0.95},
        "5 iterations": {"train.optimizer.newton_schulz_steps": 5},
        "document mask": {"train.document_mask": True},
    },
    "120m": {
        "the demo's settings": REDUCED | {"train.tokens": "1.8M"},
        "earlier recipe": REDUCED
        | {
            "train.tokens": "3M",
            "train.batch_sequences": 16,
            "train.micro_batch_sequences": 16,
            "train.optimizer": {"name": "adamw", "learning_rate": 2e-3},
            "train.schedule": {"name": "cosine", "warmup_steps": 20, "final_learning_rate": 2e-4},
        },
    },
}
"""Changed fields of the demo's recipe in each row of each table."""


class Trained(NamedTuple):
    """The result of a run."""

    tokens: int
    bits_per_byte: float
    seconds: float
    """Time of the run without its start, by the median speed of its steps."""


def main() -> None:
    """Train all rows with all seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2], help="default: %(default)s")
    parser.add_argument("--model", choices=ROWS, default="demo", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows besides the first one; default: all")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/tinyllama-benchmarks/demo")
    chosen, fields = parser.parse_known_args()
    first, *others = ROWS[chosen.model]
    if unknown := {*(chosen.only or [])} - {first, *others}:
        parser.error(f"--only {unknown.pop()!r}: no such row; known are {'; '.join([first, *others])}")
    names = [first, *(name for name in others if not chosen.only or name in chosen.only)]
    make_data(chosen.folder)
    runs = [(name, seed) for seed in chosen.seeds for name in names]
    with ThreadPoolExecutor(available_cpu_count()) as pool:
        found = pool.map(lambda run: train(chosen.folder, chosen.model, *run, fields), runs)
        scores = dict(zip(runs, found, strict=True))
    print("\n".join(table(scores, names, chosen.seeds)))


def make_data(folder: Path) -> None:
    """Write the demo's corpus, tokenizer and store, unless they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "runs/demo/corpus").is_dir():
        tinyllama(folder, "corpus", "runs/demo/corpus")
    if not (folder / "runs/demo/tokenizer/tokenizer.json").is_file():
        tinyllama(folder, "tokenizer", "train", "demo")
    tinyllama(folder, "prepare", "demo")


def train(folder: Path, model: str, row: str, seed: int, fields: Sequence[str]) -> Trained:
    """Train a row of a model's table with one thread; `fields` are flags for all rows."""
    run = RunDir(folder / "runs" / f"{model}-{re.sub('[^A-Za-z0-9]+', '-', row)}-{seed}")
    changes = {"name": run.path.name, "seed": str(seed), "train.sample_prompts": "[]", **ROWS[model][row]}
    tinyllama(folder, "train", "demo", *flags(changes), *fields, threads=1)
    rows = [*run.metrics()]
    tokens, speed = rows[-1]["tokens"], statistics.median(row["tokens_per_second"] for row in rows)
    return Trained(tokens, rows[-1]["validation_bits_per_byte"], tokens / speed)


def flags(fields: Mapping[str, object]) -> list[str]:
    """Return the words of a command that set fields of a recipe."""
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def tinyllama(folder: Path, *words: str, threads: int | None = None) -> None:
    """Run a command of tinyllama in a folder, with so many threads or with one per core."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, "-m", "tinyllama", *words]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=sys.stderr)


def table(found: Mapping[tuple[str, int], Trained], names: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    """Yield the lines of the table: mean over the seeds, and mean and standard error of the differences."""
    yield "| run | tokens | core minutes | bits per byte | difference to the first row |"
    yield "|---|---|---|---|---|"
    for name in names:
        values = [found[name, seed].bits_per_byte for seed in seeds]
        differences = [value - found[names[0], seed].bits_per_byte for value, seed in zip(values, seeds, strict=True)]
        difference = "" if name == names[0] else with_error(differences, "+")
        tokens = found[name, seeds[0]].tokens
        minutes = statistics.median(found[name, seed].seconds for seed in seeds) / 60
        yield f"| {name} | {tokens / 1e6:.2f}M | {minutes:.1f} | {with_error(values)} | {difference} |"


def with_error(values: Sequence[float], sign: str = "") -> str:
    """Return the mean with its standard error, such as `1.7020 ± 0.0012`; one value has no error."""
    mean = f"{statistics.mean(values):{sign}.4f}"
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
