"""Program that runs all stages in the working directory, under a clock that runs backwards (see backwards.c)."""

import time

from tests.faults.conftest import EVALUATE, RUN, skip_peak

from tinyllama.cli import main

skip_peak()
before = time.time()
for command in (
    "tokenizer train recipe.yaml --vocab-size 600",
    "prepare recipe.yaml",
    "inspect store --verify",
    "train recipe.yaml --track.tensorboard true",
    f"release {RUN} --formats huggingface",
    " ".join(map(str, EVALUATE)),
    f"report {RUN}",
    f"generate {RUN} import",
    "runs",
):
    assert main([*command.split(), "--quiet"]) == 0, command
assert time.time() < before - 1000, "the clock runs forward"
