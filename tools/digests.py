"""Hashes of a token store's files and of trained weights, made from fixed inputs.

A refactoring must not change these hashes. Run `.venv/bin/python tools/digests.py` before and after the change, on the
same machine with the same torch, and compare the outputs.
"""

import hashlib
import json
import os
import random
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from tinyllama.prepare.pipeline import build_store
from tinyllama.recipe import Recipe
from tinyllama.release.release import release_run
from tinyllama.tokenizer.training import train_tokenizer, training_text
from tinyllama.train.loop import train

SUFFIXES = (".tokens", ".documents", ".rows")
# This recipe is separate from the tests' recipe, so that changing the tests does not change the hashes.
RECIPE = {
    "name": "digests",
    "tokenizer": "tokenizer",
    "data": {
        "store": "store",
        "workers": 1,
        "sources": {
            "words": {"format": "jsonl", "path": "raw/words.jsonl", "weight": 0.7},
            "lines": {"format": "text", "path": "raw/lines.txt", "weight": 0.3, "separator": "\n"},
        },
        "validation_fraction": 0.1,
    },
    "model": {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 128, "context_length": 128},
    "train": {
        "tokens": 30 * 6 * 64,
        "sequence_length": 64,
        "batch_sequences": 6,
        "micro_batch_sequences": 2,
        "precision": "fp32",
        "compile": False,
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"name": "cosine", "warmup_steps": 5, "final_learning_rate": 3e-4},
    },
    "checkpoint": {"every_steps": 10},
}


def main() -> None:
    """Make a store and a model in a temporary folder and print the hashes as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        chance = random.Random(0)
        vocabulary = ["".join(chance.choices("abcdefghijklmnop é中\n", k=chance.randint(1, 9))) for _ in range(2000)]
        texts = [" ".join(chance.choices(vocabulary, k=chance.randint(5, 200))) for _ in range(400)]
        Path("raw").mkdir()
        Path("raw/words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:300]))
        Path("raw/lines.txt").write_text("\n".join(texts[300:]))
        train_tokenizer(training_text(texts), 600).save("tokenizer", 128)
        recipe = Recipe.model_validate(RECIPE)
        build_store(recipe)
        files = {str(path): path for path in sorted(Path("store").rglob("*")) if path.suffix in SUFFIXES}
        found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
        weights = load_file(release_run(train(recipe), formats=["huggingface"]) / "huggingface/model.safetensors")
        joined = b"".join(name.encode() + weights[name].view(torch.uint8).numpy().tobytes() for name in sorted(weights))
        print(json.dumps(found | {"weights": hashlib.sha256(joined).hexdigest()}, indent=2))


if __name__ == "__main__":
    main()
