"""Training of the bundled recipe tinyllama-1.1b on this machine's CPU, with measurements of memory and speed.

`tinyllama train` runs three steps with the full sequence length of 2,048, a smaller batch and float32 weights. The text
is the embedded corpus, in the schemas of the two datasets. There is no learning-rate warm-up, so that two optimizer
steps already change the loss. The run writes a checkpoint of 13 GB under --work, which the script deletes. The exit
status is 1 if the loss does not fall, or if the process needs more than --gibibytes of memory, including the
checkpoint. Arguments after `--` are those of `tinyllama train`.

    python benchmarks/training_1b.py
    python benchmarks/training_1b.py -- --parallel.activation_checkpointing full
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from measuring import DEFAULT_WORK
from training_setup import Work, environment, make_work

RECIPE = "tinyllama-1.1b"
LENGTH = 2048
SOURCES = ("slimpajama", "starcoderdata")


def main() -> None:
    """Train, print a line per step, and return the exit status."""
    arguments = parse_arguments()
    work = make_work(arguments.work.resolve())
    data = prepare(work)
    with tempfile.TemporaryDirectory(prefix="run-1b-", dir=work.folder) as folder:
        flags = [*data, *training_flags(arguments.steps, arguments.batch_sequences), *arguments.flags]
        begun = time.perf_counter()
        train(flags, Path(folder), environment(work, arguments.threads))
        (path,) = Path(folder).glob("runs/*/metrics.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print_rows(rows)
    print(f"{time.perf_counter() - begun:.0f} s in total; peak memory of the process {peak / 2**30:.2f} GiB")
    problems = judge(rows, peak, arguments)
    if problems:
        raise SystemExit("\n".join(problems))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="cache folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-sequences", type=int, default=2, help="rows per step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the process (default: %(default)s)")
    parser.add_argument("--gibibytes", type=float, default=23, help="maximum memory in GiB (default: %(default)s)")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="fields of the recipe, as flags")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: a loss can fall from the second step on")
    return arguments


def prepare(work: Work) -> list[str]:
    """Return the flags of a recipe that reads the embedded corpus; its store is written once."""
    corpus, store = work.folder / "corpus", work.folder / "store-1b"
    flags = ["--tokenizer", str(work.tokenizer), "--data.store", str(store)]
    for name in SOURCES:
        flags += [f"--data.sources.{name}.path", str(corpus / name)]
    if not (store / "manifest.sha256").is_file():
        for command in (["corpus", str(corpus)], ["prepare", RECIPE, *flags]):
            subprocess.run([sys.executable, "-m", "tinyllama", *command], check=True)
    return flags


def training_flags(steps: int, batch_sequences: int) -> list[str]:
    """Return flags for a small machine and a short run: few activations are kept, and saving makes no copy."""
    fields: dict[str, Any] = {
        "train.tokens": steps * batch_sequences * LENGTH,
        "train.batch_sequences": batch_sequences,
        "train.micro_batch_sequences": 1,
        "train.schedule.warmup_steps": 0,
        "train.validation_sequences": 1,
        "parallel.activation_checkpointing": "selective",
        "checkpoint.asynchronous": "false",
    }
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


def train(flags: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    """Run `tinyllama train` with its progress."""
    command = [sys.executable, "-m", "tinyllama", "train", RECIPE, *flags]
    status = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    if status:
        raise SystemExit(f"tinyllama train {RECIPE} {' '.join(flags)}: status {status}")


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print a line per step, and the speed without the first step, which compiles."""
    for row in rows:
        print(
            f"step {row['step']}: loss {row['loss']:.4f}, {row['tokens_per_second']:.1f} tokens/s, "
            f"MFU {100 * row['mfu']:.1f} %, peak {row['memory_bytes'] / 2**30:.2f} GiB"
        )
    speed, mfu = (statistics.median(row[name] for row in rows[1:]) for name in ("tokens_per_second", "mfu"))
    print(f"median after the first step: {speed:.1f} tokens/s, MFU {100 * mfu:.1f} %")


def judge(rows: list[dict[str, Any]], peak: int, arguments: argparse.Namespace) -> list[str]:
    """Return the failed checks."""
    problems = []
    losses = [row["loss"] for row in rows]
    if len(losses) != arguments.steps:
        problems.append(f"{len(losses)} steps instead of {arguments.steps}")
    if not all(later < earlier for earlier, later in pairwise(losses)):
        problems.append(f"the loss does not fall: {', '.join(f'{loss:.4f}' for loss in losses)}")
    if peak > arguments.gibibytes * 2**30:
        problems.append(f"the process took {peak / 2**30:.2f} GiB; at most {arguments.gibibytes:g} GiB are allowed")
    return problems


if __name__ == "__main__":
    main()
