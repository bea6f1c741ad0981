"""The public Python functions that combine several packages; the command line calls the same ones."""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tinyllama.formatting import echo
from tinyllama.loading import load_model, load_tokenizer
from tinyllama.model.generation import generate, stream_decode
from tinyllama.preflight import check_training
from tinyllama.recipe import Recipe


def train_model(recipe: Recipe, *, allow_change: bool = False) -> Path:
    """Check the recipe, print warnings, and train its model or resume its run; return the run's folder.

    Under torchrun every rank calls this. Raises InputError and RunStoppedError as `train.loop.train` does, and
    InputError if the release at a milestone would fail.
    """
    from tinyllama.train.loop import train  # noqa: PLC0415 - takes seconds that other functions do not need

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
    """Load a model (see `loading.resolve_model`) and yield the prompt, then its continuation in parts.

    Raises InputError if the source is not a model, or as `model.generation.generate` does.
    """
    model, tokenizer = load_model(source), load_tokenizer(source)
    ids = tokenizer.bos_prefix + tokenizer.encode(prompt)
    tokens = generate(
        model, ids, max_new_tokens, temperature=temperature, top_k=top_k, stop_id=tokenizer.eos_id, seed=seed
    )
    for first in tokens:
        # Yield the prompt only now: the first token shows that the arguments are valid.
        yield prompt
        yield from stream_decode(tokenizer, ids, chain([first], tokens))
