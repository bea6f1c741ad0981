"""Checks of `tinyllama train` on a GPU, for benchmarks/gpu.py: losses, repeatability, resume, checkpoints.

All runs train one small model on a store made of this Python's own source text. A bundle for a machine without a
network contains that store (benchmarks/gpu_bundle.py).
"""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_correctness import largest
from gpu_speed import count_synchronisations

from tinyllama import Recipe, hardware, load_model
from tinyllama.data.batches import batches
from tinyllama.distributed import World
from tinyllama.errors import summarize_error
from tinyllama.train.loop import TrainingLoop, forward_backward
from tinyllama.train.setup import build, initialize_weights, optimizer_step

INPUTS = Path(os.environ.get("GPU_INPUTS") or Path(__file__).parent / "gpu-inputs")
"""Tokenizer and store of a bundle, or those that `inputs` made; without them, the part `training` makes its own."""
STEPS, CHECKPOINT_STEPS, KILL_STEP = 20, 5, 7
RECIPE: dict[str, Any] = {
    "model": {"dim": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_dim": 704, "context_length": 256},
    "train": {
        "tokens": STEPS * 8 * 256,
        "sequence_length": 256,
        "batch_sequences": 8,
        "micro_batch_sequences": 4,
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 2, "final_learning_rate": 1e-4},
        "validation_sequences": 8,
    },
    "checkpoint": {"every_steps": CHECKPOINT_STEPS},
    "release": {"tasks": []},
}
TINY_RECIPE = RECIPE | {
    "model": {"dim": 128, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 256, "context_length": 128},
    "train": RECIPE["train"] | {"tokens": STEPS * 8 * 128, "sequence_length": 128, "compile": False},
}
FP32 = {"train.precision": "fp32", "train.compile": "false"}
FP16 = FP32 | {"train.precision": "fp16"}
DETERMINISTIC = {"train.deterministic": "true"}
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
BYTES_PER_RUN = 4_000_000_000
"""Memory that a run may need: an assumption."""
Runs = Mapping[str, Future[int]]
"""Runs by name. The result is the last step before SIGKILL, or else the number of steps."""


def training(device: str) -> Iterator[dict[str, Any]]:
    """Yield the checks; on a CPU, each run that belongs to the GPU trains on the CPU too.

    Independent runs train at the same time. An error of a run fails only the checks that need the run.
    """
    close_to_cpu, close_to_fp32 = partial(compare_losses, other="cpu", limit=1e-3), partial(compare_losses, other="gpu")
    comparisons: dict[str, tuple[str, Callable[[Runs, str], dict[str, Any]]]] = {
        "gpu": (f"losses of {STEPS} steps in fp32 equal the CPU's", close_to_cpu),
        "second": ("train.deterministic repeats bit for bit", compare_bits),
        "killed": ("resume after kill -9 reaches the same bits", compare_bits),
        "to-cpu": ("a run that moves to the CPU has the CPU's losses", close_to_cpu),
        "to-gpu": ("a run that moves to the GPU has the CPU's losses", close_to_cpu),
        "bf16": ("losses in bf16, compiled, are close to those in fp32", partial(close_to_fp32, limit=0.1)),
        "fp16": ("losses in fp16 are close to those in fp32", compare_fp16),
    }
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(simultaneous_runs(device)) as pool:
        recipe = write_inputs(Path(folder), RECIPE if device == "cuda" else TINY_RECIPE)
        os.chdir(folder)
        runs = start_runs(pool, recipe, device)
        stopped = pool.submit(stop, recipe, "stopped", gpu_environment(device))
        yield attempt("a training step waits for the GPU once", partial(step_waits, recipe, device))
        for name, (check, compare) in comparisons.items():
            if name in runs:
                yield attempt(check, partial(compare, runs, name))
        yield attempt("SIGTERM saves and exits", stopped.result)
        if device == "cuda":
            yield attempt("an unusable GPU is refused", partial(refusal, recipe))


def attempt(check: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a check, which fails if the call raises an exception."""
    try:
        return {"check": check} | call()
    except Exception as error:
        return {"check": check, "found": summarize_error(error), "passed": False}


def simultaneous_runs(device: str) -> int:
    """Return how many runs may train at the same time, by the number of cores and the memory of the device."""
    memory = torch.cuda.mem_get_info()[0] if device == "cuda" else hardware.total_memory_bytes()
    return max(1, min(8, hardware.available_cpu_count(), memory // BYTES_PER_RUN))


def gpu_environment(device: str) -> dict[str, str]:
    """Return the environment variables of the runs that belong to the GPU."""
    return {} if device == "cuda" else NO_GPU | {"OMP_NUM_THREADS": "1"}


def start_runs(pool: ThreadPoolExecutor, recipe: Path, device: str) -> Runs:
    """Start the runs that the checks compare, the most valuable first; on a CPU, only one run for each function."""
    gpu = gpu_environment(device)
    cpu = NO_GPU if device == "cuda" else gpu
    jobs = {
        "gpu": partial(train, fields=FP32, environment=gpu),
        "cpu": partial(train, fields=FP32, environment=cpu),
        "first": partial(train, fields=DETERMINISTIC, environment=gpu),
        "second": partial(train, fields=DETERMINISTIC, environment=gpu),
        "killed": partial(kill_and_resume, fields=DETERMINISTIC, before=gpu, after=gpu),
        "to-cpu": partial(kill_and_resume, fields=FP32, before=gpu, after=cpu),
        "to-gpu": partial(kill_and_resume, fields=FP32, before=cpu, after=gpu),
        "bf16": partial(train, fields={}, environment=gpu),
        "fp16": partial(train, fields=FP16, environment=gpu),
    }
    names = jobs if device == "cuda" else ("gpu", "cpu", "first", "killed")
    return {name: pool.submit(jobs[name], recipe, name) for name in names}


def inputs(device: str) -> Iterator[dict[str, Any]]:
    """Make the folder of inputs again, and yield the size of its store; both are the same on each device."""
    shutil.rmtree(INPUTS, ignore_errors=True)
    INPUTS.mkdir(parents=True)
    write_inputs(INPUTS)
    size = sum(path.stat().st_size for path in (INPUTS / "store").rglob("*") if path.is_file())
    yield {"what": "store", "found": f"{size / 1e6:.1f} MB"}


def step_waits(recipe: Path, device: str) -> dict[str, Any]:
    """Return how often one complete training step waits for the GPU; once is expected, for the loss and the norm."""
    world = World(0, 1, torch.device(device))
    state = build(Recipe.load(recipe, {"name": "waits"}), world)
    initialize_weights(state)
    order = batches(state.recipe, state.store, 0, 0, 1, frozenset())
    with ExitStack() as stack:
        loop = TrainingLoop(state, None, None, 0, {}, stack)

        def step() -> None:
            loop._synchronize(*forward_backward(state, next(order).sequences, loop.heartbeat))
            optimizer_step(state.optimizers, 1e-3)
            state.model.zero_grad()

        step()  # compiles
        found = count_synchronisations(step)
    return {"found": f"{found} waits", "passed": found == 1} if device == "cuda" else {"found": "needs a GPU"}


def compare_losses(runs: Runs, name: str, other: str, limit: float) -> dict[str, Any]:
    """Return whether no loss of a run differs from that of the other run by `limit` nats per token or more."""
    last_step, _ = runs[name].result(), runs[other].result()
    difference = largest(abs(ours - theirs) for ours, theirs in zip(losses(name), losses(other), strict=True))
    found = f"largest difference {difference:.2g}" + (f"; killed at step {last_step}" if last_step < STEPS else "")
    return {"found": found, "passed": difference < limit}


def compare_fp16(runs: Runs, name: str) -> dict[str, Any]:
    """Return whether the losses of the fp16 run are close to those in fp32, and the loss scales.

    Up to three steps may be skipped. After a skipped step, the run has one update less, and its loss may be 0.3 nats
    higher.
    """
    runs[name].result()
    rows = metrics(name)
    scales, skips = [row["loss_scale"] for row in rows], sum("skipped" in row for row in rows)
    row = compare_losses(runs, name, "gpu", 0.05 + 0.3 * skips)
    found = f"{row['found']}; loss scale {min(scales):,.0f} to {max(scales):,.0f}; {skips} skipped steps"
    return {"found": found, "passed": row["passed"] and skips <= 3}


def compare_bits(runs: Runs, name: str) -> dict[str, Any]:
    """Return whether a run has the same final weights as the run `first`."""
    last_step, _ = runs[name].result(), runs["first"].result()
    found = f"killed at step {last_step}" if last_step < STEPS else ""
    return {"found": found, "passed": digest(name) == digest("first")}


def write_inputs(folder: Path, fields: Mapping[str, Any] = RECIPE) -> Path:
    """Write the recipe, and a tokenizer and a store unless a bundle has them; return the recipe's path."""
    inputs = INPUTS if (INPUTS / "store" / "manifest.json").is_file() else folder
    path = folder / "recipe.yaml"
    source = {"format": "jsonl", "path": str(inputs / "text.jsonl"), "weight": 1}
    data = {"store": str(inputs / "store"), "sources": {"library": source}, "validation_fraction": 0.02}
    path.write_text(json.dumps({"name": "gpu", "tokenizer": str(inputs / "tokenizer"), "data": data, **fields}))
    if inputs is folder:
        make_store(path, folder / "text.jsonl")
    return path


def make_store(recipe: Path, text: Path) -> None:
    """Write text of the standard library, and train a tokenizer and prepare a store with it."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [module.read_text(encoding="utf-8", errors="replace") for module in modules]
    text.write_text("".join(json.dumps({"text": content}) + "\n" for content in texts))
    for command in (["tokenizer", "train", str(recipe), "--vocab-size", "512"], ["prepare", str(recipe)]):
        run([*command, "--quiet"], {})


def train(recipe: Path, name: str, environment: Mapping[str, str], fields: Mapping[str, str]) -> int:
    """Run `tinyllama train` to its end as the run `name`; return the number of steps."""
    run(train_command(recipe, name, fields), environment)
    return len(metrics(name))


def train_command(recipe: Path, name: str, fields: Mapping[str, str]) -> list[str]:
    """Return the arguments of `tinyllama`."""
    flags = [part for field, value in fields.items() for part in (f"--{field}", value)]
    return ["train", str(recipe), "--quiet", "--name", name, *flags]


def run(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Run tinyllama. Raises RuntimeError with its last line if it fails."""
    ended = subprocess.run(
        [sys.executable, "-m", "tinyllama", *arguments],
        env=os.environ | environment,
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if ended.returncode:
        raise RuntimeError(f"tinyllama {arguments[0]}: exit status {ended.returncode}: {ended.stderr.strip()[-500:]}")


def start(recipe: Path, name: str, environment: Mapping[str, str], fields: Mapping[str, str], step: int) -> Any:
    """Start training and return the process when the run has logged `step` and committed a checkpoint, or has ended."""
    command = [sys.executable, "-m", "tinyllama", *train_command(recipe, name, fields)]
    process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and (len(metrics(name)) < step or not has_checkpoint(name)):
        time.sleep(0.002)
    return process


def has_checkpoint(name: str) -> bool:
    """Return whether a run has a complete checkpoint."""
    return any(Path("runs", name, "checkpoints").glob("*/commit.json"))


def kill_and_resume(
    recipe: Path, name: str, before: Mapping[str, str], after: Mapping[str, str], fields: Mapping[str, str]
) -> int:
    """Kill training with SIGKILL after its first checkpoint and before its last step, and resume it.

    `before` and `after` are the environments of the two processes. Return the last step before SIGKILL.
    """
    for _ in range(3):  # a slow poll may miss the last step
        process = start(recipe, name, before, fields, KILL_STEP)
        process.send_signal(signal.SIGKILL)
        process.wait()
        step = len(metrics(name))
        if step < STEPS and has_checkpoint(name):
            train(recipe, name, after, fields)
            return step
        shutil.rmtree(Path("runs", name), ignore_errors=True)
    raise RuntimeError(f"the run {name} ended before it could be killed, or failed")


def stop(recipe: Path, name: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Send SIGTERM after a few steps; return the exit status and the checkpoint's step."""
    process = start(recipe, name, environment, {"train.tokens": "100M"}, KILL_STEP)
    process.send_signal(signal.SIGTERM)
    status = process.wait()
    steps = len(metrics(name))
    commit = Path("runs", name, "checkpoints", f"step-{steps:08d}", "commit.json")
    return {"found": f"exit status {status} after step {steps}", "passed": status == 75 and commit.is_file()}


def refusal(recipe: Path) -> dict[str, Any]:
    """Return whether training is refused if the driver has a GPU that torch cannot use."""
    ended = subprocess.run(
        [sys.executable, "-m", "tinyllama", *train_command(recipe, "refused", {})],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "99"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = f"exit status {ended.returncode}: {ended.stderr.strip()[-200:]}"
    return {"found": found, "passed": ended.returncode == 2}


def metrics(name: str) -> list[dict[str, Any]]:
    """Return the complete rows of a run's metrics.jsonl."""
    path = Path("runs", name, "metrics.jsonl")
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(name: str) -> list[float]:
    """Return the loss of each step; NaN for a loss that is not finite."""
    return [math.nan if row["loss"] is None else row["loss"] for row in metrics(name)]


def digest(name: str) -> str:
    """Return the SHA-256 of the final weights."""
    weights = load_model(f"runs/{name}").state_dict()
    return hashlib.sha256(b"".join(weights[key].numpy().tobytes() for key in sorted(weights))).hexdigest()
