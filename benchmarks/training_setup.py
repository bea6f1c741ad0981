"""Inputs of benchmarks/training.py and training_1b.py, created once under --work before the measurement.

The text is the standard library of this Python. `tinyllama tokenizer train` trains a tokenizer of 32,000 tokens on this
text, and `tinyllama prepare` writes a token store. Peers train on the same rows as tinyllama, in the same order.
"""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyllama.data.batches import batches
from tinyllama.data.store import TokenStore
from tinyllama.model.flops import flops_per_token, num_parameters
from tinyllama.recipe import Recipe

VOCABULARY = 32_000
SOURCE = "library"
# Otherwise glibc returns large tensors to the kernel after every step, which takes up to 20 % of the time.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "40000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
LONGEST_SECONDS = 1800


class Work(NamedTuple):
    """The prepared text, tokenizer and store."""

    folder: Path
    tokenizer: Path
    store: Path
    text: Path

    def data(self) -> dict[str, Any]:
        """`data` section of a recipe for this store."""
        sources = {SOURCE: {"format": "jsonl", "path": str(self.text), "weight": 1}}
        return {"store": str(self.store), "sources": sources, "validation_fraction": 0.02}


def make_work(folder: Path) -> Work:
    """Return text, tokenizer and store, reused from an earlier run if they exist."""
    work = Work(folder, folder / "tokenizer", folder / "store", folder / "text" / "library.jsonl")
    if not (work.store / "manifest.sha256").is_file():
        write_text(work.text)
        recipe = write_recipe(folder / "prepare.yaml", small_recipe(work, 1))
        for command in (("tokenizer", "train", recipe, "--vocab-size", VOCABULARY), ("prepare", recipe)):
            subprocess.run([sys.executable, "-m", "tinyllama", *map(str, command)], check=True)
    return work


def write_text(path: Path) -> None:
    """Write the standard library's modules as rows of JSON, without duplicates."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = (module for module in sorted(library.rglob("*.py")) if "site-packages" not in module.parts)
    texts = {hashlib.sha256(module.read_bytes()).digest(): module for module in modules}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for module in texts.values():
            try:
                text = module.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # test data in other encodings
                continue
            if text.strip():
                file.write(json.dumps({"text": text}) + "\n")


def write_recipe(path: Path, fields: Mapping[str, Any]) -> Path:
    """Write the recipe as a file; JSON is YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=1))
    return path


def small_recipe(work: Work, steps: int) -> dict[str, Any]:
    """Return the recipe of shape small: 55M parameters, 8 sequences of 512 tokens per step."""
    return {
        "name": "training",
        "tokenizer": str(work.tokenizer),
        "data": work.data(),
        "model": {"dim": 512, "layers": 8, "heads": 8, "kv_heads": 2, "ffn_dim": 1408, "context_length": 512},
        "train": {
            "tokens": steps * 8 * 512,
            "sequence_length": 512,
            "batch_sequences": 8,
            "micro_batch_sequences": 8,
            "optimizer": {"learning_rate": 1e-3, "max_gradient_norm": 1.0},
            "schedule": {"name": "cosine", "warmup_steps": 2, "final_learning_rate": 1e-4},
            "validate_every_steps": 2,  # a validation also times the matrix product
            "validation_sequences": 8,
        },
        "checkpoint": {"every_steps": 10**9},
    }


def write_rows(path: Path, recipe: Recipe) -> Path:
    """Write the training rows in order, uint16 [steps x batch_sequences, sequence_length + 1]; return the path."""
    store = TokenStore.open(recipe.data.store)
    np.save(path, np.concatenate([batch.sequences.numpy() for batch in batches(recipe, store, 0)]).astype(np.uint16))
    return path


def peer_job(work: Work, folder: Path, fields: Mapping[str, Any], settings: Mapping[str, str]) -> Path:
    """Write a peer's job for benchmarks/training_peers.py: the recipe's shape and the rows that tinyllama reads."""
    recipe = Recipe.load(write_recipe(folder / "recipe.yaml", fields))
    model = recipe.model
    job = {
        **model.model_dump(),
        **settings,
        "vocab_size": VOCABULARY,
        "tokenizer": str(work.tokenizer),
        "rows": str(write_rows(folder / "rows.npy", recipe)),
        "steps": recipe.train.steps,
        "batch_sequences": recipe.train.batch_sequences,
        "sequence_length": recipe.train.sequence_length,
        "learning_rate": recipe.train.optimizer.learning_rate,
        "product_every_steps": recipe.train.validate_every_steps,
        "num_parameters": num_parameters(model, VOCABULARY),
        "flops_per_token": flops_per_token(model, VOCABULARY, recipe.train.sequence_length),
    }
    (folder / "job.json").write_text(json.dumps(job))
    return folder / "job.json"


def environment(work: Work, threads: int) -> dict[str, str]:
    """Return the environment of all programs: threads, allocator settings, offline mode of the hub, compile cache."""
    fixed = {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(work.folder / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return {**inherited, **KEEP_MEMORY, **fixed}  # without the wait policy that importing tinyllama may have set


@contextmanager
def busy_process() -> Iterator[None]:
    """Run a process during the block that always computes, in one thread."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run_logged(command: Sequence[str | Path], log: Path, cwd: Path, env: Mapping[str, str]) -> None:
    """Run a process with its output in `log`. Raises RuntimeError with the last lines of the log if it fails."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=cwd, env=env)
        try:
            status = f"status {process.wait(LONGEST_SECONDS)}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"nothing after {LONGEST_SECONDS} s"
    if process.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise RuntimeError(f"{status}\n{last}")
