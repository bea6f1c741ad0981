"""Program that feeds trackio with the runs of a folder twice and prints trackio's data: `trackio_process.py FOLDER`.

A process can open the data of one folder only.
"""

import json
import sys
from pathlib import Path

from tinyllama.tracking.trackio_sink import PROJECT, open_trackio
from tinyllama.tracking.watch import TrackioFeeder

folder = Path(sys.argv[1])
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
