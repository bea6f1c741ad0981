"""Evaluation of models on lm-eval's tasks. Importing the package loads neither torch nor lm-eval."""
