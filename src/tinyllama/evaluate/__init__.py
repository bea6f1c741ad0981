"""Evaluation of models on lm-eval's tasks. The import loads neither torch nor lm-eval."""
