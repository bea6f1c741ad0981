"""What all tests share: no hub, and a small real data set that is prepared once."""

import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import yaml

from tinyllama.data.prepare import prepare
from tinyllama.recipe import Recipe
from tinyllama.tokenizer_training import train_tokenizer

# A process that holds a folder's lock until its standard input ends.
HOLD = """
import sys
from pathlib import Path
from tinyllama.files import alone_in
with alone_in(Path(sys.argv[1]), sys.argv[2], ""):
    print("held", flush=True)
    sys.stdin.read()
"""


def python_sources(count: int) -> list[str]:
    """The first `count` modules of the standard library: real text that is everywhere."""
    return [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))[:count]]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def small_recipe(folder: Path) -> dict[str, Any]:
    """A recipe that trains in seconds: two sources, 40 steps."""
    return {
        "name": "small",
        "tokenizer": str(folder / "tokenizer"),
        "data": {
            "store": str(folder / "store"),
            "workers": 1,
            "sources": {
                "modules": {"format": "jsonl", "path": str(folder / "raw/modules"), "weight": 0.7},
                "lines": {"format": "jsonl", "path": str(folder / "raw/lines"), "weight": 0.3},
            },
            "holdout": 0.1,
        },
        "model": {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 128, "context": 128},
        "train": {
            "tokens": 40 * 6 * 64,
            "sequence_length": 64,
            "batch_sequences": 6,
            "micro_batch_sequences": 2,
            "precision": "fp32",
            "compile": False,
            "optimizer": {"learning_rate": 3e-3},
            "schedule": {"name": "cosine", "warmup_steps": 5, "final_learning_rate": 3e-4},
            "validate_every_steps": 20,
            "validation_sequences": 20,
        },
        "checkpoint": {"every_steps": 10, "keep": 2},
        "track": {"trackio": False},
    }


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw text, a tokenizer, a prepared store and `recipe.yaml`, all real and small. Read only."""
    folder = tmp_path_factory.mktemp("small")
    modules = python_sources(40)
    write_jsonl(folder / "raw/modules/a.jsonl", modules[:20])
    write_jsonl(folder / "raw/modules/b.jsonl", modules[20:])
    write_jsonl(
        folder / "raw/lines/a.jsonl", [line for text in modules for line in text.splitlines() if line.strip()][:4000]
    )
    train_tokenizer(modules, 600).save(folder / "tokenizer", 128)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(folder), sort_keys=False))
    prepare(Recipe.load(folder / "recipe.yaml"))
    return folder
