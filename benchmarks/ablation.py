"""Ablation of a candidate for a better recipe of the demo: bits per byte without each of its settings, over seeds.

    python benchmarks/ablation.py [--seeds 1337 1 2] [--only NAME...] [--folder DIR] [--train.tokens 1M]

The candidate has half of the demo's tokens, Muon and other optimizer settings. Each row of the table changes one of its
settings, except those of the demo's own recipe. A seed determines the initial weights and the order of the data.
Differences are those of runs with equal seeds. Other flags are fields of all rows, for trials.

As many runs as there are cores train at a time, with one thread each. This is faster than one run with all cores, but
the runs do not show the time that a recipe takes. Interrupted runs resume, and finished runs are not repeated.
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
from typing import NamedTuple

from tinyllama.hardware import available_cpu_count
from tinyllama.runs.run_dir import RunDir

CANDIDATE = {
    "train.tokens": "1.5M",
    "train.batch_sequences": "8",
    "train.micro_batch_sequences": "8",
    "train.optimizer.name": "muon",
    "train.optimizer.momentum": "0.9",
    "train.optimizer.embedding_learning_rate": "2e-2",
    "train.optimizer.newton_schulz_steps": "3",
    "train.optimizer.normalize_rows": "true",
    "train.schedule.decay_fraction": "0.7",
}
"""Fields of the candidate for a better recipe."""
ROWS: dict[str, dict[str, str]] = {
    "candidate": CANDIDATE,
    "the demo's recipe": {},
    "the demo's recipe, fewer tokens": {"train.tokens": CANDIDATE["train.tokens"]},
    "AdamW": CANDIDATE | {"train.optimizer.name": "adamw"},
    "16 sequences per step": CANDIDATE | {"train.batch_sequences": "16", "train.micro_batch_sequences": "16"},
    "one learning rate": CANDIDATE | {"train.optimizer.embedding_learning_rate": "3e-3"},
    "5 iterations": CANDIDATE | {"train.optimizer.newton_schulz_steps": "5"},
    "rows not normalized": CANDIDATE | {"train.optimizer.normalize_rows": "false"},
    "momentum 0.95": CANDIDATE | {"train.optimizer.momentum": "0.95"},
    "decay over 40 %": CANDIDATE | {"train.schedule.decay_fraction": "0.4"},
}
"""Changed fields of the demo's recipe in each row."""


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
    names = list(dict.fromkeys(["candidate", *chosen.only]))
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
    run = RunDir(folder / "runs" / f"{re.sub('[^A-Za-z0-9]+', '-', name)}-{seed}")
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
    yield "| run | tokens | bits per byte | difference to the candidate |"
    yield "|---|---|---|---|"
    for name in names:
        values = [found[name, seed].bits_per_byte for seed in seeds]
        differences = [
            value - found["candidate", seed].bits_per_byte for value, seed in zip(values, seeds, strict=True)
        ]
        difference = "" if name == "candidate" else with_error(differences, "+")
        tokens = found[name, seeds[0]].tokens
        yield f"| {name} | {tokens / 1e6:.2f}M | {with_error(values)} | {difference} |"


def with_error(values: Sequence[float], sign: str = "") -> str:
    """Return the mean with its standard error, such as `1.7020 ± 0.0012`; one value has no error."""
    mean = f"{statistics.mean(values):{sign}.4f}"
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
