"""Pretrain small Llama models: one recipe from raw text to a released model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tinyllama.openmp import choose_wait_policy

if TYPE_CHECKING:
    from tinyllama.api import (
        EvaluationResult,
        ReleaseResult,
        Run,
        evaluate_model,
        generate_text,
        prepare_store,
        release_run,
        stream_text,
        train_model,
        train_tokenizer,
    )
    from tinyllama.data.order import sequences
    from tinyllama.data.store import TokenStore
    from tinyllama.errors import InputError, RunStoppedError
    from tinyllama.loading import load_model, load_tokenizer
    from tinyllama.model.generation import Sampling
    from tinyllama.model.llama import Llama
    from tinyllama.recipe import Recipe
    from tinyllama.tokenizer import Tokenizer

    __version__: str

choose_wait_policy()

__all__ = [
    "EvaluationResult",
    "InputError",
    "Llama",
    "Recipe",
    "ReleaseResult",
    "Run",
    "RunStoppedError",
    "Sampling",
    "TokenStore",
    "Tokenizer",
    "evaluate_model",
    "generate_text",
    "load_model",
    "load_tokenizer",
    "prepare_store",
    "release_run",
    "sequences",
    "stream_text",
    "train_model",
    "train_tokenizer",
]

_MODULES = {
    "InputError": "errors",
    "Llama": "model.llama",
    "Recipe": "recipe",
    "RunStoppedError": "errors",
    "Sampling": "model.generation",
    "TokenStore": "data.store",
    "Tokenizer": "tokenizer",
    "load_model": "loading",
    "load_tokenizer": "loading",
    "sequences": "data.order",
}
"""Modules of the public names that are not in `api`."""


def __dir__() -> list[str]:
    """Return the public names and the version, for completion in a shell or a notebook."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `tinyllama --help` does not load torch."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - the import takes longer than the rest of the package

        return version("tinyllama")
    if name not in __all__:
        raise AttributeError(f"module 'tinyllama' has no attribute {name!r}")
    return getattr(import_module(f"tinyllama.{_MODULES.get(name, 'api')}"), name)
