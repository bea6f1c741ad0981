"""Program that reads the batches of two epochs with tinyllama or litdata, for benchmarks/resuming.py.

    resuming_walks.py PROGRAM FOLDER NUM_WORKERS STEP save|resume [STOP]

`save` starts at the beginning of the first epoch and saves its state after STEP batches. `resume` continues from that
state in another process. Both print a line of JSON at their first batch. Without STOP, both continue to the end of the
second epoch and write the hash of every row that they read, by epoch.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROWS, LENGTH = 8, 2048

# ruff: noqa: PLC0415 - each program is imported only where it runs


def walk_ours(folder: Path, step: int, resumed: bool) -> Iterator[Iterator[Any]]:
    """Yield the two epochs' batches; the saved state is the step."""
    from tinyllama.data.batches import batches
    from tinyllama.data.store import TokenStore
    from tinyllama.recipe import Recipe

    imported()
    recipe, store = Recipe.load(folder / "recipe.yaml"), TokenStore.open(folder / "store")
    epoch = recipe.train.steps // 2
    stream = (batch.sequences for batch in batches(recipe, store, step if resumed else 0))
    yield islice(stream, epoch - step if resumed else epoch)
    yield stream


def walk_litdata(folder: Path, workers: int, step: int, resumed: bool) -> Iterator[Iterator[Any]]:
    """Yield the two epochs' batches from a StreamingDataLoader with its state_dict, as in its documentation."""
    import litdata

    imported()
    items = litdata.TokensLoader(block_size=LENGTH + 1)
    data = litdata.StreamingDataset(str(folder / "litdata"), item_loader=items, shuffle=True, drop_last=True)
    loader = litdata.StreamingDataLoader(data, batch_size=ROWS, num_workers=workers)
    state = folder / f"state-{workers}.json"
    if resumed:
        loader.load_state_dict(json.loads(state.read_bytes()))
        yield iter(loader)
    else:
        yield saving(loader, step, state)
    yield iter(loader)


def saving(loader: Any, step: int, state: Path) -> Iterator[Any]:
    """Yield an epoch's batches and write the state after `step` of them."""
    for number, batch in enumerate(loader, start=1):
        yield batch
        if number == step:  # before the next batch is requested
            state.write_text(json.dumps(loader.state_dict()))


def imported() -> None:
    """Record the time from which the program's own work is measured."""
    global begun  # noqa: PLW0603
    begun = time.perf_counter()


begun = 0.0


def hashes_of(batch: Any) -> list[str]:
    """Return the hash of each row of a batch; rows of random tokens are all different."""
    return [hashlib.blake2b(row.numpy().astype("int64").tobytes(), digest_size=8).hexdigest() for row in batch]


def main(program: str, folder: str, workers: str, step: str, mode: str, stop: str = "") -> None:
    """Read the batches and print the time of the first batch."""
    resumed = mode == "resume"
    if program == "tinyllama":
        epochs = walk_ours(Path(folder), int(step), resumed)
    else:
        epochs = walk_litdata(Path(folder), int(workers), int(step), resumed)
    read: list[list[str]] = []
    for epoch in epochs:
        rows: list[str] = []
        for batch in epoch:
            rows += hashes_of(batch)
            if not read and len(rows) == ROWS:
                print(json.dumps({"own_seconds": time.perf_counter() - begun, "rows": rows}), flush=True)
                if stop:
                    return
        read.append(rows)
    (Path(folder) / f"{program}-{workers}-{mode}.json").write_text(json.dumps(read))


if __name__ == "__main__":
    main(*sys.argv[1:])
