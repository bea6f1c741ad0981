"""Comparison of `tinyllama plan --measure` with training on this machine's CPU: memory and speed.

For three models with a vocabulary of 32,000 tokens, the script runs `tinyllama plan --measure --json` and a few steps
of `tinyllama train` in turns. Speed is compared as MFU. Both commands measure the machine's peak FLOP/s during their
run, so other jobs affect both equally. The exit status is 1 if a prediction is wrong by more than 15 %.

    python benchmarks/plan.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring import DEFAULT_WORK
from training_setup import Work, environment, make_work, small_recipe, write_recipe

from tinyllama.runs.run_dir import RunDir

STEPS = 9
TOLERANCE = 0.15
# model fields; sequences per step, tokens per sequence
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "20M": ({"dim": 384, "layers": 6, "heads": 6, "kv_heads": 2, "ffn_dim": 1024, "tie_embeddings": True}, 16, 256),
    "55M": ({"dim": 512, "layers": 8, "heads": 8, "kv_heads": 2, "ffn_dim": 1408}, 8, 512),
    "125M": ({"dim": 768, "layers": 12, "heads": 12, "kv_heads": 4, "ffn_dim": 2048}, 4, 1024),
}


def main() -> None:
    """Print a line per model and quantity; exit with status 1 if a prediction is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="cache folder (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads per process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per model (default: %(default)s)")
    arguments = parser.parse_args()
    work = make_work(arguments.work.resolve())
    env = environment(work, arguments.threads)
    off = []
    for name in SHAPES:
        with tempfile.TemporaryDirectory(prefix="plan-", dir=work.folder) as folder:
            off += compare(work, Path(folder), name, env, arguments.rounds)
    if off:
        raise SystemExit(f"more than {TOLERANCE:.0%} off: {', '.join(off)}")


def compare(work: Work, folder: Path, name: str, env: Mapping[str, str], rounds: int) -> list[str]:
    """Plan and train one model in turns; return the quantities with a wrong prediction."""
    recipe = write_recipe(folder / f"{name}.yaml", fields(work, name))
    planned, trained = [], []
    for number in range(rounds):
        planned.append(plan(folder, recipe, env))
        trained.append(train(folder, recipe, f"{name}-{number}", env))
    found = []
    for what, key in (("memory", "memory"), ("MFU", "mfu")):
        predicted, measured = (statistics.median(row[key] for row in rows) for rows in (planned, trained))
        ratios = sorted(plan[key] / train[key] for plan, train in zip(planned, trained, strict=True))
        ratio = predicted / measured
        unit = (
            f"{predicted / 1e9:.2f} and {measured / 1e9:.2f} GB"
            if key == "memory"
            else f"{predicted:.1%}, {measured:.1%}"
        )
        print(f"{name} {what}: planned and measured {unit}: {ratio:.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})", flush=True)
        found += [f"{name} {what}"] if abs(ratio - 1) > TOLERANCE else []
    return found


def fields(work: Work, name: str) -> dict[str, Any]:
    """Return the recipe of a model, with a checkpoint during its steps."""
    model, rows, length = SHAPES[name]
    recipe = small_recipe(work, STEPS)
    recipe["model"] = {**model, "context_length": length}
    batch = {"batch_sequences": rows, "micro_batch_sequences": rows, "sequence_length": length}
    recipe["train"] = {**recipe["train"], **batch, "tokens": STEPS * rows * length, "validation_sequences": rows}
    return {**recipe, "name": name, "checkpoint": {"every_steps": 4, "keep": 1}}


def plan(folder: Path, recipe: Path, env: Mapping[str, str]) -> dict[str, float]:
    """Return memory and MFU that `tinyllama plan --measure` predicts."""
    command = [sys.executable, "-m", "tinyllama", "plan", str(recipe), "--hardware", "cpu", "--measure", "--json"]
    output = subprocess.run(command, cwd=folder, env=dict(env), check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(output)
    return {"memory": figures["memory_bytes_per_gpu"], "mfu": figures["mfu"]}


def train(folder: Path, recipe: Path, name: str, env: Mapping[str, str]) -> dict[str, float]:
    """Return the peak memory and the MFU of `tinyllama train`, with the MFU of its first steps excluded."""
    command = [sys.executable, "-m", "tinyllama", "train", str(recipe), "--name", name]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, env=dict(env), **quiet)
    _, status, used = os.wait4(process.pid, 0)  # the peak includes the last checkpoint
    if status:
        raise SystemExit(f"{' '.join(command)}: status {status}")
    rows = list(RunDir(folder / "runs" / name).metrics())
    return {"memory": 1024 * used.ru_maxrss, "mfu": statistics.median(row["mfu"] for row in rows[2:-1])}


if __name__ == "__main__":
    main()
