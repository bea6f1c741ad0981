"""Open the store of a trillion tokens and print what that takes as JSON: `read_program.py STORE`."""

import cProfile
import json
import re
import sys
import tracemalloc
from pathlib import Path

from tinyllama.data.order import sequences
from tinyllama.data.store import TokenStore
from tinyllama.recipe import Recipe

store, recipe = TokenStore.open(sys.argv[1]), Recipe.load("tinyllama-1.1b")


def work_of(step: int) -> list[int]:
    """Return the calls and bytes of a step, which are the same on every machine."""
    profile = cProfile.Profile()
    tracemalloc.start()
    profile.runcall(sequences, recipe, store, step)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    profile.create_stats()
    return [sum(entry[1] for entry in profile.stats.values()), peak]


source, _, index = sequences(recipe, store, 1_430_000)[-1].tolist()
tokens = store["starcoderdata/train"].read(index * 2048, index * 2048 + 2049)
found = re.search("VmHWM:\\s*([0-9]+)", Path("/proc/self/status").read_text())
print(
    json.dumps(
        {
            "tokens": sum(split.num_tokens for split in store.splits.values()),
            "read": [source, len(tokens)],
            "torch": "torch" in sys.modules,
            "work": [work_of(0), work_of(1_430_000)],
            "peak_bytes": 1024 * int(found[1]) if found else 0,
        }
    )
)
