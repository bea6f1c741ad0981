"""What trackers keep of a run, read back from their files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record


def tensorboard(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def wandb_rows(run: Path) -> list[dict[str, Any]]:
    """The history in all of W&B's files, in the order in which they were written."""
    found = [record.history for record in wandb_records(run) if record.HasField("history")]
    return [{(item.key or item.nested_key[0]): json.loads(item.value_json) for item in one.item} for one in found]


def wandb_alerts(run: Path) -> list[str]:
    return [record.alert.title for record in wandb_records(run) if record.HasField("alert")]


def wandb_records(run: Path) -> Iterator[Record]:
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime):
        yield from map(Record.FromString, _records(path.read_bytes()))


def _records(data: bytes) -> Iterator[bytes]:
    """LevelDB's format, blocks of 32 KiB, after a header of 7 bytes; a cut record ends it."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # what is left of a block is too small for a record's header
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if place + 7 + length > len(data):
            return
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""
