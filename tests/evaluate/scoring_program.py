"""Evaluates each model of its arguments; torchrun starts it on several ranks, whose start takes most of the time."""

import sys

from tinyllama import cli

FLAGS = ["--tasks", "winogrande", "arc_easy", "--limit", "12", "--precision", "fp32", "--batch-size", "16"]

if __name__ == "__main__":
    sys.exit(max(cli.main(["evaluate", model, *FLAGS]) for model in sys.argv[1:]))
