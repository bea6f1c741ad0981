"""Program that builds rank 5 of 16 of the 1.1B model and prints its parameters, all parameters, and memory in bytes.

The memory is the rise of the process's peak while the model is built and initialized.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tinyllama.distributed import World
from tinyllama.model.llama import initialize
from tinyllama.recipe import Recipe
from tinyllama.train.setup import build_model


def peak_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


dist.init_process_group("fake", rank=5, world_size=16, store=FakeStore())
before = peak_bytes()
recipe = Recipe.load("tinyllama-1.1b", {"train.compile": False})  # importing the compiler takes 200 MB
model = build_model(recipe, 32_000, World(5, 16, torch.device("cpu")))
initialize(model, recipe.seed)
local = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
print(local, sum(parameter.numel() for parameter in model.parameters()), peak_bytes() - before)
