"""Comparison of AdamW and Muon with cosine and WSD schedules, by validation bits per byte at equal tokens.

    python benchmarks/optimizers.py [--tokens 4M] [--folder DIR]

The model has the shape of tinyllama-120m with a quarter of its width (12 layers, dim 192, 3 heads, 1 key/value head,
FFN 512), and a vocabulary of 4,096 tokens trained on the embedded corpus. The first call writes text, tokenizer and
store to the folder. The four runs start from equal initial weights and read equal batches. Interrupted runs resume.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tinyllama.runs.run_dir import RunDir

LEARNING_RATE = 3e-3
RECIPE: dict[str, Any] = {
    "name": "optimizers",
    "tokenizer": "tokenizer",
    "data": {
        "store": "store",
        "sources": {
            "slimpajama": {
                "format": "slimpajama",
                "path": "corpus/slimpajama",
                "weight": 0.7,
                "exclude": ["RedPajamaGithub"],
            },
            "starcoderdata": {"format": "starcoderdata", "path": "corpus/starcoderdata", "weight": 0.3},
        },
        "validation_fraction": 0.02,
    },
    "model": {"dim": 192, "layers": 12, "heads": 3, "kv_heads": 1, "ffn_dim": 512, "context_length": 256},
    "train": {
        "tokens": "4M",
        "sequence_length": 256,
        "batch_sequences": 32,
        "micro_batch_sequences": 32,
        "optimizer": {"learning_rate": LEARNING_RATE},
        "schedule": {"warmup_steps": 40, "final_learning_rate": LEARNING_RATE / 10},
        "validate_every_steps": 100,
        "validation_sequences": 512,
    },
    "checkpoint": {"every_steps": 100, "keep": 1},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokens", default="4M", help="tokens per run")
    arguments.add_argument("--folder", type=Path, default=Path.home() / ".cache/tinyllama-benchmarks/optimizers")
    chosen = arguments.parse_args()
    make_data(chosen.folder)
    print("| optimizer | schedule | validation loss | bits per byte | tokens/s |\n|---|---|---|---|---|", flush=True)
    for optimizer, schedule in itertools.product(("adamw", "muon"), ("cosine", "wsd")):
        name = f"{optimizer}-{schedule}-{chosen.tokens}"
        flags = ["--name", name, "--train.tokens", chosen.tokens]
        flags += ["--train.optimizer.name", optimizer, "--train.schedule.name", schedule]
        tinyllama(chosen.folder, "train", "recipe.yaml", *flags)
        rows = list(RunDir(chosen.folder / "runs" / name).metrics())
        speed = sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2]
        scores = f"{rows[-1]['validation_loss']:.4f} | {rows[-1]['validation_bits_per_byte']:.4f}"
        print(f"| {optimizer} | {schedule} | {scores} | {speed:,.0f} |", flush=True)


def make_data(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    if not (folder / "store/manifest.json").is_file():
        tinyllama(folder, "corpus", "corpus")
        tinyllama(folder, "tokenizer", "train", "recipe.yaml", "--vocab-size", "4096")
        tinyllama(folder, "prepare", "recipe.yaml")


def tinyllama(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "tinyllama", *words], cwd=folder, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
