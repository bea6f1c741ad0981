"""Program that saves each rank's shards of the initial weights: `shards_program.py RECIPE '[[size, replicate], ...]'`.

Each rank is a fork of one process, under torch's fake process group. It writes `SIZE-REPLICATE-RANK.pt`.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tinyllama.distributed import World
from tinyllama.model.llama import initialize
from tinyllama.recipe import Recipe
from tinyllama.train.setup import build_model


def save_shards(recipe: Recipe, rank: int, size: int) -> None:
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    model = build_model(recipe, 601, World(rank, size, torch.device("cpu")))
    initialize(model, recipe.seed)
    shards = {name: p.to_local() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    torch.save(shards, f"{size}-{recipe.parallel.replicate}-{rank}.pt")


torch.set_num_threads(1)
for world_size, replicate in json.loads(sys.argv[2]):
    for number in range(world_size):
        child = os.fork()  # which saves the imports
        if not child:
            save_shards(Recipe.load(sys.argv[1], {"parallel.replicate": replicate}), number, world_size)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
