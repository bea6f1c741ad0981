"""Checks of `tinyllama train` on a GPU, for benchmarks/gpu.py: losses, repeatability, resume, checkpoints.

All runs train one small model on a store made of this Python's own source text. A bundle for a machine without a
network contains that store (benchmarks/gpu_bundle.py).
"""

import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from gpu_speed import count_synchronisations

from tinyllama import Recipe, load_model
from tinyllama.data.batches import batches
from tinyllama.distributed import World
from tinyllama.train.loop import TrainingLoop, forward_backward
from tinyllama.train.setup import build, initialize_weights, optimizer_step

INPUTS = Path(os.environ.get("GPU_INPUTS") or Path(__file__).parent / "gpu-inputs")
"""Tokenizer and store of a bundle, or those that `inputs` made; without them, the part `training` makes its own."""
STEPS, CHECKPOINT_STEPS, KILL_STEP = 20, 5, 12
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
UNCOMPILED_RECIPE = RECIPE | {"train": RECIPE["train"] | {"compile": False}}
FP32 = {"train.precision": "fp32", "train.compile": "false"}
FP16 = FP32 | {"train.precision": "fp16"}
DETERMINISTIC = {"train.deterministic": "true"}


def training(device: str) -> Iterator[dict[str, Any]]:
    """Yield the checks; on a CPU, each run that belongs to the GPU trains on the CPU too.

    Runs whose speed is not measured train at the same time.
    """
    gpu, cpu = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        recipe = write_inputs(Path(folder), RECIPE if device == "cuda" else UNCOMPILED_RECIPE)
        os.chdir(folder)
        runs = [pool.submit(train, recipe, "cpu", cpu, FP32), pool.submit(train, recipe, "gpu", gpu, FP32)]
        if device == "cuda":  # on a CPU, training in fp16 would take an hour
            runs.append(pool.submit(train, recipe, "fp16", gpu, FP16))
        for run_of_pool in runs:
            run_of_pool.result()
        difference = max(abs(ours - theirs) for ours, theirs in zip(losses("gpu"), losses("cpu"), strict=True))
        check = f"losses of {STEPS} steps in fp32 equal the CPU's"
        yield {"check": check, "found": f"largest difference {difference:.2g}", "passed": difference < 1e-3}
        if device == "cuda":
            yield fp16()
        yield from checkpoints(device)
        yield step_waits(recipe, device)
        train(recipe, "first", gpu, DETERMINISTIC)
        train(recipe, "free", gpu, {})
        yield compare_with_fp32("free", "bf16 with the recipe's compilation", 0.1)
        cost = 1 - speed("first") / speed("free")
        yield {"check": "cost of train.deterministic", "found": f"{100 * cost:.1f} % of the throughput"}
        second = pool.submit(train, recipe, "second", gpu, DETERMINISTIC)
        killed = pool.submit(kill_and_resume, recipe, "killed", gpu, DETERMINISTIC)
        stopped = pool.submit(stop, recipe, "stopped", gpu)
        refused = pool.submit(refusal, recipe) if device == "cuda" else None
        second.result()
        equal = digest("first") == digest("second")
        yield {"check": "train.deterministic repeats bit for bit", "passed": equal}
        found = f"killed at step {killed.result()}"
        equal = digest("first") == digest("killed")
        yield {"check": "resume after kill -9 reaches the same bits", "found": found, "passed": equal}
        yield {"check": "SIGTERM saves and exits", **stopped.result()}
        if refused:
            yield refused.result()


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
            loop._synchronize(*forward_backward(state, next(order), loop.heartbeat))
            optimizer_step(state.optimizers, 1e-3)
            state.model.zero_grad()

        step()  # compiles
        row: dict[str, Any] = {"check": "a training step waits for the GPU once"}
        if device == "cpu":
            step()
            return row | {"found": "needs a GPU"}
        found = count_synchronisations(step)
    return row | {"found": f"{found} waits", "passed": found == 1}


def fp16() -> dict[str, Any]:
    """Return whether the losses of the fp16 run are close to those in fp32, and the loss scales."""
    scales = [row["loss_scale"] for row in metrics("fp16")]
    row = compare_with_fp32("fp16", "fp16", 5e-2)
    return row | {"found": f"{row['found']}; loss scale {min(scales):,.0f} to {max(scales):,.0f}"}


def compare_with_fp32(name: str, precision: str, limit: float) -> dict[str, Any]:
    """Return whether no loss of a run differs from that of the float32 run by `limit` nats per token or more."""
    difference = max(abs(ours - theirs) for ours, theirs in zip(losses(name), losses("gpu"), strict=True))
    check = f"losses of {STEPS} steps in {precision} are close to those in fp32"
    return {"check": check, "found": f"largest difference {difference:.2g}", "passed": difference < limit}


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


def train(recipe: Path, name: str, environment: Mapping[str, str], fields: Mapping[str, str]) -> None:
    """Run `tinyllama train` to its end as the run `name`."""
    run(train_command(recipe, name, fields), environment)


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
    """Start training and return the process when the run has logged `step`."""
    command = [sys.executable, "-m", "tinyllama", *train_command(recipe, name, fields)]
    process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(metrics(name)) < step:
        time.sleep(0.005)
    return process


def kill_and_resume(recipe: Path, name: str, environment: Mapping[str, str], fields: Mapping[str, str]) -> int:
    """Kill training with SIGKILL after a step that is not the last, and resume; return the last step before SIGKILL."""
    process = start(recipe, name, environment, fields, KILL_STEP)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = len(metrics(name))
    train(recipe, name, environment, fields)
    return step


def stop(recipe: Path, name: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Send SIGTERM after a few steps; return the exit status and the checkpoint's step."""
    process = start(recipe, name, environment, {"train.tokens": "100M"}, 3)
    process.send_signal(signal.SIGTERM)
    status = process.wait()
    steps = len(metrics(name))
    return {"found": f"exit status {status} after step {steps}", "passed": status == 75}


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
    return {"check": "an unusable GPU is refused", "found": found, "passed": ended.returncode == 2}


def checkpoints(device: str) -> Iterator[dict[str, Any]]:
    """Yield the loss of a checkpoint on the device that wrote it and on the other device."""
    for name, there in (("gpu", "cpu"), ("cpu", device)):
        model = load_model(f"runs/{name}")
        ids = torch.randint(model.vocab_size, (4, 257), generator=torch.Generator().manual_seed(1))
        found = []
        for place in ("cpu", device):
            moved = model.to(place)
            with torch.no_grad():
                found.append(float(moved.loss(ids[:, :-1].to(place), ids[:, 1:].to(place))))
        difference = abs(found[0] / found[1] - 1)
        check = f"checkpoint of the {name} run gives the same loss on {there}"
        yield {"check": check, "found": f"relative difference {difference:.2g}", "passed": difference < 1e-5}


def metrics(name: str) -> list[dict[str, Any]]:
    """Return the complete rows of a run's metrics.jsonl."""
    path = Path("runs", name, "metrics.jsonl")
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(name: str) -> list[float]:
    """Return the loss of each step."""
    return [row["loss"] for row in metrics(name)]


def speed(name: str) -> float:
    """Return the median of tokens per second over the second half of the steps."""
    return statistics.median(row["tokens_per_second"] for row in metrics(name)[STEPS // 2 :])


def digest(name: str) -> str:
    """Return the SHA-256 of the final weights."""
    weights = load_model(f"runs/{name}").state_dict()
    return hashlib.sha256(b"".join(weights[key].numpy().tobytes() for key in sorted(weights))).hexdigest()
