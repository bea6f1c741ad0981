"""Benchmark scores of a model, through lm-eval, which is imported only when something is scored."""

from tinyllama.evaluate.scores import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
