"""Ablation of the demo's recipe: bits per byte with one setting changed at a time, over several seeds.

    python benchmarks/ablation.py [--seeds 1337 1 2] [--only NAME...] [--folder DIR] [--train.tokens 1M]

Each row of the table changes one setting of the recipe. The row "first edition" has the settings and the number of
tokens that the demo had before. A seed determines the initial weights and the order of the data. Differences are those
of runs with equal seeds. Other flags are fields of all rows, for trials.

As many runs as there are cores train at a time, with one thread each. This is faster than one run with all cores, but
the runs do not show the time that a recipe takes. Interrupted runs resume, and finished runs are not repeated.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tinyllama.hardware import available_cpu_count
from tinyllama.runs.run_dir import RunDir

ROWS: dict[str, dict[str, str]] = {
    "recipe": {},
    "first edition": {
        "train.tokens": "3M",
        "train.batch_sequences": "32",
        "train.micro_batch_sequences": "32",
        "train.optimizer": "{learning_rate: 3e-3}",
        "train.schedule": "{name: wsd, warmup_steps: 20, final_learning_rate: 0, decay_fraction: 0.4}",
    },
    "AdamW instead of Muon": {"train.optimizer.name": "adamw"},
}
"""Changed fields of each row."""


class Trained(NamedTuple):
    """The result of a run."""

    tokens: int
    bits_per_byte: float


def main() -> None:
    """Train all rows with all seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2], help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="; ".join(ROWS))
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/tinyllama-benchmarks/demo")
    chosen, fields = parser.parse_known_args()
    make_data(chosen.folder)
    names = list(dict.fromkeys(["recipe", *chosen.only]))
    runs = [(name, seed) for seed in chosen.seeds for name in names]
    with ThreadPoolExecutor(available_cpu_count()) as pool:
        found = pool.map(lambda run: train(chosen.folder, *run, fields), runs)
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


def train(folder: Path, name: str, seed: int, fields: Sequence[str]) -> Trained:
    """Train a row of the table with one thread."""
    run = RunDir(folder / "runs" / f"{name.replace(' ', '-')}-{seed}")
    changes = {"name": run.path.name, "seed": str(seed), "train.sample_prompts": "[]", **ROWS[name]}
    tinyllama(folder, "train", "demo", *flags(changes), *fields, threads=1)
    last = [*run.metrics()][-1]
    return Trained(last["tokens"], last["validation_bits_per_byte"])


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
    yield "| run | tokens | bits per byte | difference to the recipe |"
    yield "|---|---|---|---|"
    for name in names:
        values = [found[name, seed].bits_per_byte for seed in seeds]
        differences = [value - found["recipe", seed].bits_per_byte for value, seed in zip(values, seeds, strict=True)]
        difference = "" if name == "recipe" else with_error(differences, "+")
        tokens = found[name, seeds[0]].tokens
        yield f"| {name} | {tokens / 1e6:.2f}M | {with_error(values)} | {difference} |"


def with_error(values: Sequence[float], sign: str = "") -> str:
    """Return the mean with its standard error, such as `1.7020 ± 0.0012`; one value has no error."""
    mean = f"{statistics.mean(values):{sign}.4f}"
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
