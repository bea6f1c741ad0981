"""What trackers have of a run, read from their files."""

import json
from collections.abc import Iterator
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.wandb_sink import _read_records


def tensorboard(run: RunDir) -> EventAccumulator:
    found = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def wandb_rows(run: RunDir) -> list[dict[str, Any]]:
    """Return the rows in all of W&B's files, in the order in which they were written."""
    found = [record.history for record in _wandb_records(run) if record.HasField("history")]
    return [{(item.key or item.nested_key[0]): json.loads(item.value_json) for item in one.item} for one in found]


def wandb_alerts(run: RunDir) -> list[str]:
    return [record.alert.title for record in _wandb_records(run) if record.HasField("alert")]


def _wandb_records(run: RunDir) -> Iterator[Record]:
    paths = sorted(run.path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime)
    for path in paths:
        yield from map(Record.FromString, _read_records(path.read_bytes()))
