"""Pretrain small Llama models: one recipe from raw text to a released model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllama.api import evaluate_model, generate_text, prepare_store, train_model
    from tinyllama.data.order import sequences
    from tinyllama.data.store import TokenStore
    from tinyllama.errors import InputError
    from tinyllama.loading import load_model
    from tinyllama.model.llama import Llama
    from tinyllama.recipe import Recipe
    from tinyllama.release.release import release_run
    from tinyllama.runs.run_dir import RunDir as Run
    from tinyllama.tokenizer import Tokenizer

__all__ = [
    "InputError",
    "Llama",
    "Recipe",
    "Run",
    "TokenStore",
    "Tokenizer",
    "evaluate_model",
    "generate_text",
    "load_model",
    "prepare_store",
    "release_run",
    "sequences",
    "train_model",
]

_LOCATIONS = {
    "InputError": "errors.InputError",
    "Llama": "model.llama.Llama",
    "Recipe": "recipe.Recipe",
    "Run": "runs.run_dir.RunDir",
    "TokenStore": "data.store.TokenStore",
    "Tokenizer": "tokenizer.Tokenizer",
    "evaluate_model": "api.evaluate_model",
    "generate_text": "api.generate_text",
    "load_model": "loading.load_model",
    "prepare_store": "api.prepare_store",
    "release_run": "release.release.release_run",
    "sequences": "data.order.sequences",
    "train_model": "api.train_model",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `tinyllama --help` does not load torch."""
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'tinyllama' has no attribute {name!r}")
    module, _, attribute = f"tinyllama.{_LOCATIONS[name]}".rpartition(".")
    return getattr(import_module(module), attribute)
