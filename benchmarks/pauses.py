"""Measurement of the time that a run spends outside its steps on this machine's CPU: starting, compiling, saving.

Starting and compiling: the time from the command to the end of the first step for the demo's shape, without
torch.compile, with an empty compile cache, and with a filled compile cache. Saving: a checkpoint every fourth step for
55M parameters (660 MB per checkpoint), asynchronously and synchronously.

    python benchmarks/pauses.py
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring import DEFAULT_WORK
from training_setup import Work, environment, make_work, small_recipe, write_recipe

from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir

SAVE_EVERY = 4


def main() -> None:
    """Print the times of starting, compiling and saving, in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="cache folder (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the process (default: %(default)s)")
    arguments = parser.parse_args()
    work = make_work(arguments.work.resolve())
    env = environment(work, arguments.threads)
    with tempfile.TemporaryDirectory(prefix="pauses-", dir=work.folder) as folder:
        print_starting(work, Path(folder), env)
        print_saving(work, Path(folder), env)


def print_starting(work: Work, folder: Path, env: Mapping[str, str]) -> None:
    """Print the time to the end of the first step: uncompiled, compiled, and compiled with a filled cache."""
    cached = {**env, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    plain = first_step_seconds(work, folder / "plain", cached, compiled=False)
    cold = first_step_seconds(work, folder / "cold", cached, compiled=True)
    warm = first_step_seconds(work, folder / "warm", cached, compiled=True)
    print(f"the demo's shape, to the end of the first step: {plain:.1f} s uncompiled")
    print(f"compiling adds {cold - plain:.1f} s at first and {warm - plain:.1f} s from the cache", flush=True)


def first_step_seconds(work: Work, folder: Path, env: Mapping[str, str], compiled: bool) -> float:
    """Return the time from the command to the first row of metrics, in seconds."""
    shape = Recipe.load("demo").model_dump(mode="json")
    train = shape["train"] | {"compile": compiled, "tokens": 2 * Recipe.load("demo").train.batch_tokens}
    train["schedule"]["warmup_steps"] = 1
    fields = small_recipe(work, 2) | {"model": shape["model"], "train": train}
    begun = time.perf_counter()
    process = start(folder, fields, env)
    run = RunDir(folder / "runs" / fields["name"])
    while not any(run.metrics()):
        if process.poll():
            raise SystemExit(f"training ended with status {process.returncode}; see {folder}/log")
        time.sleep(0.02)
    seconds = time.perf_counter() - begun
    finish(process)
    return seconds


def print_saving(work: Work, folder: Path, env: Mapping[str, str]) -> None:
    """Print the duration of a checkpoint, the part in which training waits, and the speed of steps during the save."""
    for asynchronous in (True, False):
        fields = small_recipe(work, 4 * SAVE_EVERY + 1)
        fields["checkpoint"] = {"every_steps": SAVE_EVERY, "keep": 1, "asynchronous": asynchronous}
        fields["name"] = "asynchronous" if asynchronous else "synchronous"
        finish(start(folder, fields, env))
        run = folder / "runs" / fields["name"]
        saves = [row for row in RunDir(run).events() if row["event"] == "checkpoint"][:-1]
        rows = list(RunDir(run).metrics())[SAVE_EVERY:]
        during = statistics.median(row["tokens_per_second"] for row in rows if row["step"] % SAVE_EVERY == 1)
        others = statistics.median(row["tokens_per_second"] for row in rows if row["step"] % SAVE_EVERY != 1)
        seconds, stalled = (statistics.median(row[key] for row in saves) for key in ("seconds", "stall_seconds"))
        print(
            f"{fields['name']} checkpoint: {seconds:.1f} s, of which training waits {stalled:.2f} s;  "
            f"the next step runs at {during / others:.2f} times the speed of other steps",
            flush=True,
        )


def start(folder: Path, fields: dict[str, Any], env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start `tinyllama train` with its output in `log`."""
    recipe = write_recipe(folder / f"{fields['name']}.yaml", fields)
    with (folder / "log").open("ab") as log:
        command = [sys.executable, "-m", "tinyllama", "train", recipe.name]
        return subprocess.Popen(command, cwd=folder, env=dict(env), stdout=log, stderr=log)


def finish(process: "subprocess.Popen[bytes]") -> None:
    """Wait until the process ends."""
    if process.wait():
        raise SystemExit(f"tinyllama train: status {process.returncode}")


if __name__ == "__main__":
    main()
