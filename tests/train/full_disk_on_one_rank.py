"""Two ranks write two checkpoints; the disk of rank 1 is full at the first. Writes what each rank reports."""

import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tinyllama.distributed import init_distributed
from tinyllama.recipe import Recipe
from tinyllama.runs.checkpoint import CheckpointWriter
from tinyllama.runs.run_dir import RunDir
from tinyllama.train.setup import build, initialize_weights


def fail(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


def main(recipe: str) -> None:
    write = FileSystemWriter.write_data
    with init_distributed(60) as world:
        state = build(Recipe.load(recipe), world)
        initialize_weights(state)
        writer = CheckpointWriter(RunDir(Path("run")), True, lambda *_: None)
        for step in (1, 2):
            setattr(FileSystemWriter, "write_data", fail if (world.rank, step) == (1, 1) else write)  # noqa: B010
            writer.start_save(step, state.model, state.optimizers, {}, time.perf_counter())
            Path(f"{world.rank}-{step}").write_text(str(writer.wait()))


if __name__ == "__main__":
    main(sys.argv[1])
