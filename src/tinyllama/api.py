"""Public Python functions that combine several packages; the command line calls them too.

Each function imports its modules when it is called, so that `import tinyllama` does not load torch, which takes
seconds.
"""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.formatting import echo
from tinyllama.recipe import Recipe

if TYPE_CHECKING:
    from tinyllama.data.store import TokenStore

# ruff: noqa: PLC0415


def prepare_store(recipe: Recipe, strict: bool = False) -> "TokenStore | None":
    """Check the recipe, print warnings, and make or complete its token store.

    Raises the same errors as `prepare.pipeline.build_store`, and InputError if training with the recipe or the
    release at a milestone would fail.
    """
    from tinyllama.preflight import check_preparation
    from tinyllama.prepare import pipeline

    for warning in check_preparation(recipe):
        echo(warning, to_stderr=True)
    return pipeline.build_store(recipe, strict)


def train_model(recipe: Recipe, *, allow_change: bool = False) -> Path:
    """Check the recipe, print warnings, and train its model or resume its run; return the run's folder.

    Under torchrun every rank calls this function. Raises the same errors as `train.loop.train`, and InputError if the
    release at a milestone would fail.
    """
    from tinyllama.preflight import check_training
    from tinyllama.train.loop import train

    warnings = check_training(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    for warning in warnings if os.environ.get("RANK", "0") == "0" else ():
        echo(warning, to_stderr=True)
    return train(recipe, allow_change=allow_change)


def generate_text(
    source: str,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Load a model and yield the prompt, then its continuation in parts.

    `loading.resolve_model` explains `source`. Raises InputError if `source` is not a model, and the same errors as
    `model.generation.generate`.
    """
    from tinyllama.loading import load_model, load_tokenizer
    from tinyllama.model.generation import generate, stream_decode

    model, tokenizer = load_model(source), load_tokenizer(source)
    ids = tokenizer.bos_prefix + tokenizer.encode(prompt)
    tokens = generate(
        model, ids, max_new_tokens, temperature=temperature, top_k=top_k, stop_id=tokenizer.eos_id, seed=seed
    )
    for first in tokens:
        # Yield the prompt only now: the first token shows that the arguments are valid.
        yield prompt
        yield from stream_decode(tokenizer, ids, chain([first], tokens))
