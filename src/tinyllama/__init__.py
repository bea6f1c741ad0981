"""Pretrain small Llama models: one recipe from raw text to a released model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllama.api import generate_text
    from tinyllama.data.order import sequences
    from tinyllama.data.store import TokenStore
    from tinyllama.errors import InputError
    from tinyllama.loading import load_model
    from tinyllama.model.llama import Llama
    from tinyllama.recipe import Recipe
    from tinyllama.tokenizer import Tokenizer

__all__ = ["InputError", "Llama", "Recipe", "TokenStore", "Tokenizer", "generate_text", "load_model", "sequences"]

_MODULES = {
    "InputError": "errors",
    "Llama": "model.llama",
    "Recipe": "recipe",
    "TokenStore": "data.store",
    "Tokenizer": "tokenizer",
    "generate_text": "api",
    "load_model": "loading",
    "sequences": "data.order",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `tinyllama --help` does not load torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'tinyllama' has no attribute {name!r}")
    return getattr(import_module(f"tinyllama.{_MODULES[name]}"), name)
