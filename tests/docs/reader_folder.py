"""The folder in which a page's commands run: raw text in all formats of the pages, and the output of the stages."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard
from tests.conftest import python_sources
from tests.docs.blocks import ROOT
from tests.docs.rules import SHAPE, STEP
from tests.docs.shell import Shell

LANGUAGES = ("c", "cpp", "go", "python", "rust")
SUBSETS = ("RedPajamaC4", "RedPajamaWikipedia", "RedPajamaGithub")
FROM_RAW_TEXT = (
    "README.md",
    "docs/getting-started.md",
    "docs/own-data.md",
    "docs/scale.md",
    "docs/tinyllama-run.md",
    "docs/tutorial.md",
)
"""Pages that start with raw text only; the others also find the output of all stages."""
MAKES_ITS_OWN_TEXT = "docs/own-data.md"
"""The one of them whose first snippet writes its raw text."""
AFTER_THE_DEMO = ("README.md", "docs/getting-started.md")
"""Those of them whose reader has run `make demo`."""


def write_raw(folder: Path) -> None:
    """Write the modules of the standard library, one per document, in every format that a page names."""
    texts = python_sources(40)
    raw = folder / "raw"
    _lines(raw / "notes/2024.jsonl", [{"body": text} for text in texts[:20]])
    _lines(raw / "notes/2025.jsonl", [{"body": text} for text in texts[20:]])
    for number, text in enumerate(texts[:10]):
        _text(raw / f"manuals/part{number % 2}/{number}.txt", text)
    for place in (raw / "SlimPajama-627B", folder / "runs/demo/corpus/slimpajama"):
        rows = [{"text": text, "meta": {"redpajama_set_name": SUBSETS[i % 3]}} for i, text in enumerate(texts)]
        for split in ("train", "validation", "test"):
            _packed(place / split / "chunk1/example_0.jsonl.zst", rows)
    for place in (raw / "starcoderdata", folder / "runs/demo/corpus/starcoderdata"):
        for number, language in enumerate((*LANGUAGES, "github-issues-filtered-structured")):
            _table(place / language / "train-00000-of-00001.parquet", "content", texts[number::6])
    _packed(raw / "web/a.jsonl.zst", [{"text": text} for text in texts])


def write_recipe(path: Path, name: str) -> None:
    """Write a recipe of the notes and manuals that trains within seconds."""
    fields = {
        "name": name,
        "tokenizer": "tokenizers/mine",
        "data": {
            "store": "data/mine",
            "workers": 1,
            "sources": {
                "notes": {"format": "jsonl", "path": "raw/notes", "text": "body", "weight": 0.8},
                "manuals": {"format": "text", "path": "raw/manuals", "weight": 0.2},
            },
            "validation_fraction": 0.2,
        },
        "model": SHAPE | {"tie_embeddings": True},
        "train": {
            "tokens": "10M",  # so that pages can name step 1,000; the rules train 8 steps
            "sequence_length": 32,
            "batch_sequences": 4,
            "micro_batch_sequences": 4,
            "optimizer": {"learning_rate": 3e-3},
            "schedule": {"warmup_steps": 2, "final_learning_rate": 3e-4},
        },
    }
    path.write_text(yaml.safe_dump(fields, sort_keys=False))


def run_stages(folder: Path, shell: Shell) -> None:
    """Make stores, runs and a release with the commands themselves."""
    for name in ("mine", "other", "third"):
        write_recipe(folder / f"{name}.yaml", name)
    shell.run(
        f"""
        tinyllama tokenizer train mine.yaml --vocab-size 600
        tinyllama prepare mine.yaml
        tinyllama train mine.yaml
        tinyllama release runs/mine --formats huggingface gguf
        mkdir -p models tokenizers path/to
        cp -r runs/mine/releases/{STEP}/huggingface models/SmolLM2-135M
        cp -r tokenizers/mine tokenizers/llama2
        cp tokenizers/mine/tokenizer.model path/to/tokenizer.model
        cp -r tokenizers/mine runs/demo/tokenizer
        tinyllama prepare demo
        tinyllama prepare tinyllama-1.1b
        tinyllama train demo
        tinyllama release runs/demo
        for name in other third; do
            cp -r runs/mine runs/$name
            sed -i "s/^name: .*/name: $name/" runs/$name/recipe.yaml
        done
        """,
        folder,
    )


def copy_for(page: str, prepared: Path, folder: Path, shell: Shell) -> None:
    """Copy what a page needs into its folder, and link the folders of the checkout."""
    keep = {"raw", "path", "models"} if page in FROM_RAW_TEXT else {entry.name for entry in prepared.glob("[!.]*")}
    keep -= {"raw"} if page == MAKES_ITS_OWN_TEXT else set()
    for entry in sorted(prepared.iterdir()):
        if entry.name in keep and entry.is_dir():
            shutil.copytree(entry, folder / entry.name, symlinks=True)
        elif entry.name in keep:
            shutil.copy(entry, folder / entry.name)
    if page in AFTER_THE_DEMO:
        shutil.copytree(prepared / "runs/demo", folder / "runs/demo")
    shell.install(folder)
    for name in ("benchmarks", "cluster", "recipes", "src", "tests", "Makefile", "pyproject.toml", "docs"):
        (folder / name).symlink_to(ROOT / name)


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    _text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _packed(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def _table(path: Path, column: str, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts}), path)
