"""Public Python functions, and `Run`; the command line calls the same functions.

The package exports the public names of this module. Each function imports its modules when it is called, so that
`import tinyllama` does not load torch, which takes seconds.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinyllama.errors import InputError
from tinyllama.files import Row
from tinyllama.formatting import echo
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import CheckpointDir, ReleaseDir, RunDir
from tinyllama.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pandas

    from tinyllama.data.store import TokenStore
    from tinyllama.evaluate.results import Evaluation, Score
    from tinyllama.model.generation import Sampling
    from tinyllama.model.llama import Llama

# ruff: noqa: PLC0415

ModelSource = str | os.PathLike[str]
"""A model: a `Run`, or the path of a run, a checkpoint, a release or a Hugging Face folder, or a hub name."""


@dataclass(frozen=True, repr=False)
class Run:
    """A training run: recipe, metrics, events, checkpoints and model, read from the run's folder.

    Every function that takes a model accepts a run.
    """

    path: Path
    """Folder of the run."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Run":
        """Return the run in a folder that training wrote. Raises InputError if the folder contains no run."""
        return cls(RunDir.open(os.fspath(path)).path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        newest = RunDir(self.path).newest_checkpoint()
        return f"Run({self.path}: {f'newest checkpoint at step {newest.step:,}' if newest else 'no checkpoint'})"

    @property
    def recipe(self) -> Recipe:
        """Recipe with which training was last started. Raises InputError if the recipe is invalid."""
        return RunDir(self.path).recipe()

    @cached_property
    def metrics(self) -> dict[str, NDArray[Any]]:
        """Columns of metrics.jsonl by name, such as `step`, `loss` and `tokens_per_second`: [steps] each.

        A missing number is NaN; a missing text is empty. The file is read once: open the run again to see later steps.
        Raises InputError, with the line number, for an invalid row.
        """
        rows = list(RunDir(self.path).metrics())
        names = dict.fromkeys(["step", *(name for row in rows for name in row)])
        return {name: _column([row.get(name) for row in rows]) for name in names}

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the metrics as a pandas data frame with the step as its index.

        Raises InputError if pandas is not installed, and the same errors as `metrics`.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            remedy = "pip install pandas, or use Run.metrics, which needs only numpy"
            raise InputError(f"Run.to_pandas: pandas is not installed; {remedy}") from None
        return pandas.DataFrame(self.metrics).set_index("step")

    @property
    def events(self) -> list[Row]:
        """Events, oldest first: each has `time` in seconds since 1970, `event`, `step`, and details.

        Raises InputError, with the line number, for an invalid event.
        """
        return list(RunDir(self.path).events())

    @property
    def checkpoints(self) -> list[CheckpointDir]:
        """Complete checkpoints, oldest first; each has a `step` and a `path`."""
        return RunDir(self.path).checkpoints()

    def model(self, step: int | None = None) -> "Llama":
        """Load the model of the checkpoint of a step, by default the newest, in evaluation mode.

        Raises InputError if the run has no such checkpoint, or if the checkpoint is damaged.
        """
        from tinyllama.loading import load_model

        return load_model(RunDir(self.path).find_checkpoint(step).path)

    def tokenizer(self) -> Tokenizer:
        """Load the run's copy of its tokenizer. Raises InputError if the copy is missing or damaged."""
        return Tokenizer.load(RunDir(self.path).tokenizer_dir)


def _column(values: list[Any]) -> NDArray[Any]:
    missing = "" if any(isinstance(value, str) for value in values) else np.nan
    return np.array([missing if value is None else value for value in values])


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """Scores of a model, and the file that contains them."""

    evaluation: "Evaluation"
    """All metrics of each task, and the conditions under which they were measured."""
    path: Path
    """File in which the scores were saved."""

    @property
    def scores(self) -> "dict[str, Score | None]":
        """Score of each task in percent: `acc_norm` if the task has this metric, otherwise `acc`, or None."""
        from tinyllama.evaluate.results import task_score

        return {task: task_score(row) for task, row in self.evaluation.rows.items()}

    def __repr__(self) -> str:
        scores = ", ".join(f"{task} {score}" for task, score in self.scores.items())
        return f"EvaluationResult({scores}; {self.path})"


@dataclass(frozen=True)
class ReleaseResult:
    """Result of `release_run`: folder, step and formats of the release."""

    path: Path
    """Folder of the release, with one folder per format."""
    step: int | None
    """Training step of the released checkpoint; None for external weights."""
    formats: tuple[str, ...]
    """Formats of the release."""


def train_tokenizer(
    recipe: Recipe, vocab_size: int | None = None, sample_bytes: int = 16_000_000, force: bool = False
) -> Tokenizer:
    """Train a Llama-style BPE tokenizer on the recipe's sources, and save it in the folder that the recipe names.

    `vocab_size` includes 3 special tokens and 256 byte tokens; by default, it is the recipe's `vocab_size`, or 8,192.
    `sample_bytes` is the amount of text to train on. With `force`, an existing tokenizer is replaced. Raises InputError
    if a source has no text to train on, or if the folder contains a tokenizer that must not be replaced.
    """
    from tinyllama.prepare.selection import train_recipe_tokenizer

    _require_recipe(recipe, "train_tokenizer")
    return Tokenizer.load(train_recipe_tokenizer(recipe, vocab_size, sample_bytes, force).folder)


def prepare_store(recipe: Recipe, strict: bool = False) -> "TokenStore | None":
    """Check the recipe, print warnings, and write the recipe's token store, or complete an unfinished one.

    The store is returned, or None if the work was submitted to Slurm. Raises InputError if a file cannot be read to its
    end or if the store was made with other settings. With `strict`, also raises InputError if a file has few usable
    rows. Also raises InputError if training with the recipe, or the release of a milestone checkpoint, would fail.
    """
    from tinyllama.preflight import check_recipe, load_tokenizer
    from tinyllama.prepare import pipeline

    _require_recipe(recipe, "prepare_store")
    for warning in check_recipe(recipe, load_tokenizer(recipe)):
        echo(warning, to_stderr=True)
    return pipeline.build_store(recipe, strict)


def train_model(recipe: Recipe, *, allow_change: bool = False) -> Run:
    """Check the recipe, print warnings, and train its model or resume its run; return the run.

    With `allow_change`, a run resumes even if fields of the recipe that affect the weights have changed. Under torchrun
    every rank calls this function. The first Ctrl-C saves a checkpoint at the end of the step and raises
    KeyboardInterrupt. The second one, and a Ctrl-C before the end of the first step, raises KeyboardInterrupt without a
    new checkpoint. A checkpoint that is being written is completed first. Raises InputError if the store, the tokenizer
    or an existing run does not fit the recipe, or if the release of a milestone checkpoint would fail. Raises
    RunStoppedError if the run stops before its last step or if a release is missing at the end.
    """
    from tinyllama.preflight import check_training
    from tinyllama.train.loop import LoadEvaluator, train

    _require_recipe(recipe, "train_model")
    load_evaluator: LoadEvaluator | None = None
    if recipe.train.evaluate_every_steps:  # otherwise, training does not need the packages of the evaluation
        from tinyllama.evaluate import evaluation

        load_evaluator = evaluation.load_evaluator
    warnings = check_training(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    for warning in warnings if os.environ.get("RANK", "0") == "0" else ():
        echo(warning, to_stderr=True)
    return Run(train(recipe, allow_change=allow_change, load_evaluator=load_evaluator))


def _require_recipe(recipe: object, function: str) -> None:
    """Raise InputError if a function was called with the path of a recipe, or another object, instead of a recipe."""
    if not isinstance(recipe, Recipe):
        source = repr(os.fspath(recipe)) if isinstance(recipe, str | os.PathLike) else "PATH"
        raise InputError(f"{function}: expected a Recipe, not {type(recipe).__name__}; load it: Recipe.load({source})")


def release_run(
    model: ModelSource,
    *,
    step: int | None = None,
    formats: Sequence[str] | None = None,
    average: int | None = None,
    average_decay: float | None = None,
    force: bool = False,
    reuse: bool = False,
) -> ReleaseResult:
    """Release a run, a checkpoint or external weights in the formats `huggingface`, `gguf` and `ctranslate2`.

    By default, the newest checkpoint is released in the recipe's formats. `average` is the number of checkpoints to
    average, and `average_decay` the weight of each one relative to the next newer one. With `force`, an existing
    release is replaced. With `reuse`, an existing release of the same checkpoint is returned unchanged, unless `force`,
    `formats`, `average` or `average_decay` is given. Raises InputError if the model is damaged, if a format's library
    is missing, or if the release exists. Raises RunStoppedError if an engine rejects a released file or crashes.
    """
    from tinyllama.loading import model_path
    from tinyllama.release import convert
    from tinyllama.release.release import release_run as release_checkpoint

    source = model_path(model)
    path, options = Path(source), dict[str, Any](formats=formats, average=average, average_decay=average_decay)
    is_external = ReleaseDir(path).exists or (path / "config.json").is_file() or not path.exists()
    folder = None
    if reuse and not force and all(option is None for option in options.values()):
        folder = _existing_release(path, step, is_external)
    if folder is None and is_external:
        if (step, average, average_decay) != (None, None, None):
            problem = "not a run, so it has no checkpoint to select or average"
            raise InputError(f"{source}: {problem}; correct the name, or remove step, average and average_decay")
        folder = convert.release_external_weights(source, formats or convert.ALL_FORMATS, force)
    elif folder is None:
        folder = release_checkpoint(source, step=step, force=force, in_transformers=True, **options)
    metadata = ReleaseDir(folder).metadata()
    return ReleaseResult(folder, metadata["step"], tuple(metadata["formats"]))


def _existing_release(source: Path, step: int | None, is_external: bool) -> Path | None:
    """Return `source` if it is a release, else the folder of the checkpoint's existing release, or None."""
    from tinyllama.release.release import find_checkpoint

    if ReleaseDir(source).exists and step is None:
        return source
    if is_external:
        return None
    checkpoint = find_checkpoint(source, step)
    release = checkpoint.run.releases.release(checkpoint.name)
    return release.path if checkpoint.is_released_as(release) else None


def evaluate_model(
    model: ModelSource,
    tasks: str | Sequence[str] = "hellaswag",
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 64,
    precision: Literal["bf16", "fp16", "fp32"] = "bf16",
) -> EvaluationResult | None:
    """Evaluate a model on one or several of lm-eval's tasks, save the scores next to the model, and return them.

    With `limit`, only the first `limit` items of each task are scored. `num_fewshot` is the number of solved examples
    before each item, by default the task's own number. `batch_size` applies only to models other than supported Llamas.
    The model card of a release is updated. Under torchrun, ranks other than 0 return None. Raises InputError if the
    model, a task, its data or lm-eval is not available.
    """
    from tinyllama.evaluate.evaluation import evaluate_and_save
    from tinyllama.loading import model_path
    from tinyllama.model.llama import PRECISIONS
    from tinyllama.release.card import update_card

    if precision not in PRECISIONS:
        raise InputError(f"precision: {precision!r} is not supported; give {', '.join(PRECISIONS)}")
    names = [tasks] if isinstance(tasks, str) else tasks
    saved = evaluate_and_save(model_path(model), names, limit, PRECISIONS[precision], num_fewshot, batch_size)
    if saved is None:
        return None
    result = EvaluationResult(*saved)
    folder = result.path.parent
    if ReleaseDir(folder).exists and (folder / "huggingface").is_dir():  # a download from the hub has no such folder
        update_card(folder)
    return result


def generate_text(
    model: "ModelSource | Llama",
    prompt: str,
    max_new_tokens: int = 100,
    *,
    tokenizer: Tokenizer | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> str:
    """Return the prompt and its continuation, by default the most probable one (greedy).

    `model` is a run, a path or a hub name, or a loaded model with its `tokenizer`. The other arguments are the fields
    of `Sampling`. Raises InputError if the model or its tokenizer is missing, if an argument is out of range, or if the
    prompt fills the model's context.
    """
    from tinyllama.model.generation import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    return "".join(stream_text(model, prompt, max_new_tokens, sampling, tokenizer=tokenizer))


def stream_text(
    model: "ModelSource | Llama",
    prompt: str,
    max_new_tokens: int = 100,
    sampling: "Sampling | None" = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> Iterator[str]:
    """Yield the prompt, then each part of its continuation as soon as it is generated.

    `model` is a run, a path or a hub name, or a loaded model with its `tokenizer`. Without `sampling`, each token is
    the most probable one. Raises the same errors as `generate_text`.
    """
    from tinyllama.loading import load_model, load_tokenizer
    from tinyllama.model.generation import GREEDY
    from tinyllama.model.llama import Llama

    for name, value, kind, expected in (
        ("prompt", prompt, str, "a text"), ("max_new_tokens", max_new_tokens, Integral, "an integer")
    ):  # fmt: skip
        if not isinstance(value, kind):
            raise InputError(f"{name}: {value!r} is of type {type(value).__name__}; give {expected}")
    sampling = sampling or GREEDY
    if isinstance(model, Llama):
        if tokenizer is None:
            raise InputError("tokenizer: missing for a loaded model; pass tokenizer=tinyllama.load_tokenizer(PATH)")
        return _stream(model, tokenizer, prompt, max_new_tokens, sampling)
    if tokenizer is None:
        tokenizer = load_tokenizer(model)
    return _stream(load_model(model), tokenizer, prompt, max_new_tokens, sampling)


def _stream(
    model: "Llama", tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: "Sampling"
) -> Iterator[str]:
    from tinyllama.model.generation import generate, stream_decode

    ids = tokenizer.bos_prefix + tokenizer.encode(prompt)
    tokens = generate(model, ids, max_new_tokens, sampling, stop_id=tokenizer.eos_id)
    first = list(islice(tokens, 1))  # `generate` checks its arguments when it computes the first token
    yield prompt
    yield from stream_decode(tokenizer, ids, chain(first, tokens))
