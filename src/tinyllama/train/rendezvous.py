"""Where ranks meet: a part of torchrun's store that no earlier attempt has written to.

torchrun's restarted workers find the store as the ones before left it (pytorch issue 135712), with the addresses of
processes that are dead, and connect to those. Its count of restarts is each node's own, so it cannot tell attempts
apart. Here the first rank greets the others by numbers that they have drawn, so what is old is never taken for new.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_POLL_SECONDS = 0.02


def unique_prefix_store(store: dist.Store, rank: int, count: int, timeout: timedelta) -> dist.Store:
    """A store of this attempt's own, the same on all of its `count` ranks; TimeoutError where one does not come."""
    deadline = time.monotonic() + timeout.total_seconds()
    name = _publish_prefix(store, count, deadline) if rank == 0 else _receive_prefix(store, rank, deadline)
    return dist.PrefixStore(name, store)


def _publish_prefix(store: dist.Store, count: int, deadline: float) -> str:
    """Answer each other rank's newest hello with the attempt's name, until each has said that it knows it."""
    name = uuid.uuid4().hex
    missing = set(range(1, count))
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{other}", f"{store.get(f'hello/{other}').decode()} {name}")
            if store.check([f"known/{other}"]) and store.get(f"known/{other}").decode() == name:
                missing.discard(other)
        _wait(deadline, f"ranks {sorted(missing)[:8]} did not come")
    return name


def _receive_prefix(store: dist.Store, rank: int, deadline: float) -> str:
    """Say hello with a number drawn for it, and take the answer that bears it."""
    drawn = uuid.uuid4().hex
    store.set(f"hello/{rank}", drawn)
    while True:
        if store.check([f"answer/{rank}"]):
            number, name = store.get(f"answer/{rank}").decode().split()
            if number == drawn:
                store.set(f"known/{rank}", name)
                return name
        _wait(deadline, "rank 0 did not answer")


def _wait(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(problem)
    time.sleep(_POLL_SECONDS)
