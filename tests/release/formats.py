"""Helpers: releases in all formats of small models with random weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tinyllama.files import read_json, write_json
from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Model
from tinyllama.release.formats import write_formats
from tinyllama.release.metadata import hash_files
from tinyllama.release.release import write_hugging_face
from tinyllama.release.verify import Check, compute_reference_outputs, verify_release
from tinyllama.tokenizer import Tokenizer

SHAPE = Model(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128, context_length=160)
FORMATS = ("gguf", "ctranslate2")


def random_model(vocab_size: int, shape: Model = SHAPE, seed: int = 3) -> Llama:
    """Return a model with weights so large that an error in any matrix has an effect."""
    model = Llama(shape, vocab_size).eval()
    initialize(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.1)
    return model


def write_release(folder: Path, model: Llama, tokenizer: Tokenizer, formats: Sequence[str] = FORMATS) -> Path:
    metadata: dict[str, Any] = {"reference": compute_reference_outputs(model, tokenizer), "formats": list(formats)}
    write_hugging_face(folder / "huggingface", model, tokenizer)
    write_formats(folder, formats, "small")
    write_json(folder / "release.json", metadata | {"files": hash_files(folder)})
    return folder


def keep_only(release: Path, *folders: str) -> Path:
    """Reduce release.json to these folders as they are now; `verify_release` then checks nothing else."""
    metadata = read_json(release / "release.json")
    metadata["files"] = {name: entry for name, entry in hash_files(release).items() if name.startswith(folders)}
    metadata["formats"] = sorted({name.partition("/")[0] for name in folders})
    write_json(release / "release.json", metadata)
    return release


def failed_checks(release: Path) -> list[Check]:
    return [check for check in verify_release(release) if not check.passed]
