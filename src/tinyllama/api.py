"""The public Python functions that combine several packages; the command line calls the same ones."""

from collections.abc import Iterator
from itertools import chain

from tinyllama.loading import load_model, load_tokenizer
from tinyllama.model.generation import generate, stream_decode


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
