"""Benchmark scores of a model, through lm-eval, which is imported only when something is scored."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllama.evaluate.scores import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that the names of tasks can be checked without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'tinyllama.evaluate' has no attribute {name!r}")
    from tinyllama.evaluate import scores  # noqa: PLC0415

    return getattr(scores, name)
