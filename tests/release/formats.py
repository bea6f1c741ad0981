"""Releases in all formats, of small models with random weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tinyllama.files import read_json, write_json
from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Model
from tinyllama.release.formats import write_formats
from tinyllama.release.huggingface import write_hugging_face
from tinyllama.release.lineage import hash_files
from tinyllama.release.reference import compute_reference_outputs
from tinyllama.release.verify import Check, verify
from tinyllama.tokenizer import Tokenizer

SHAPE = Model(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128, context_length=160)
FORMATS = ("gguf", "ctranslate2")


def random_model(vocab_size: int, shape: Model = SHAPE) -> Llama:
    """Weights far from their initial ones, so that a mistake in any matrix would be seen."""
    model = Llama(shape, vocab_size).eval()
    initialize(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    return model


def write_release(folder: Path, model: Llama, tokenizer: Tokenizer, formats: Sequence[str] = FORMATS) -> Path:
    facts: dict[str, Any] = {"reference": compute_reference_outputs(model, tokenizer), "formats": list(formats)}
    write_hugging_face(folder / "huggingface", model, tokenizer)
    write_formats(folder, formats, "small")
    write_json(folder / "release.json", facts | {"files": hash_files(folder)})
    return folder


def only(release: Path, *folders: str) -> Path:
    """Say in release.json that the release has these folders only, as they are now: what `verify` then runs."""
    facts = read_json(release / "release.json")
    facts["files"] = {name: entry for name, entry in hash_files(release).items() if name.startswith(folders)}
    facts["formats"] = sorted({name.partition("/")[0] for name in folders})
    write_json(release / "release.json", facts)
    return release


def failed(release: Path) -> list[Check]:
    return [check for check in verify(release) if not check.passed]
