"""A process that uses trackio's data of a folder: it can open only one. ACTION FOLDER [JSON]."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import SinkPosition
from tinyllama.tracking.trackio_sink import PROJECT, TrackioSink, open_trackio
from tinyllama.tracking.watch import TrackioFeeder


def feed_and_read(folder: Path) -> None:
    """Feed trackio with the folder's runs twice; print what it has of them."""
    with TrackioFeeder(folder) as feeder:
        feeder.feed()
        feeder.feed()
    storage = open_trackio(folder / ".trackio").SQLiteStorage
    runs = storage.get_run_records(PROJECT)
    configs = storage.get_all_run_configs(PROJECT)
    found = {
        "ids": [run["id"] for run in runs],
        "names": {run["id"]: run["name"] for run in runs},
        "logs": {run["id"]: storage.get_logs(PROJECT, run_id=run["id"]) for run in runs},
        "alerts": storage.get_alerts(PROJECT),
        "groups": {run: config.get("_Group") for run, config in configs.items()},
    }
    print(json.dumps(found))


def rewind_while_listing(folder: Path) -> None:
    """Rewind the sink of the run `small` while another thread lists the entries; print each list that it saw."""
    run = RunDir(folder / "small")
    sink = TrackioSink(run, run.recipe(), SinkPosition(step=1))
    lists: list[tuple[str, ...]] = []
    ended = threading.Event()

    def list_entries() -> None:
        while not ended.is_set():
            lists.append(tuple(sorted(record["id"] for record in sink.storage.get_run_records(PROJECT))))

    thread = threading.Thread(target=list_entries, daemon=True)
    thread.start()
    while len(lists) < 1000 and thread.is_alive():
        sink.rewind(0)
    ended.set()
    thread.join()
    assert len(lists) >= 1000
    print(json.dumps(sorted(set(lists))))


def log_rows(folder: Path, rows: str) -> None:
    """Log rows of a run `small` as another program would."""
    storage = open_trackio(folder / ".trackio").SQLiteStorage
    storage.bulk_log(PROJECT, "small", json.loads(rows), [1, 2], run_id="f00")


ACTIONS: dict[str, Callable[..., None]] = {"feed": feed_and_read, "rewind": rewind_while_listing, "log": log_rows}

if __name__ == "__main__":
    ACTIONS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
