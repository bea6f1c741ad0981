"""Checks of a recipe before preparation and training.

`prepare` and `train` refuse a recipe if training or a milestone's release would fail. `doctor` lists all problems. The
checks read the tokenizer, the config.json of local initial weights, and the names of lm-eval's tasks. Settings that do
not match the run's length or number of ranks cause warnings.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from tinyllama.data.order import mixture_schedule
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.prepare.store_warnings import holdout_remedy
from tinyllama.recipe import Recipe, Release
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import HUB_NAME, NAMES

# Modules that only some recipes need are imported inside functions, so that `prepare` does not wait for torch.
# ruff: noqa: PLC0415


@dataclass(frozen=True)
class Finding:
    """A problem that would make a later stage fail."""

    what: str
    """Name of the field or file that has the problem."""
    problem: InputError
    stops: bool
    """Whether training or a milestone's release would fail; if False, only a later `tinyllama release` would fail."""


_LEARNING_RATE_TOLERANCE = 0.05
"""Maximum deviation of a learning rate from its target without a warning, as a fraction of the peak."""


def tokenizer_place(recipe: Recipe) -> Literal["disk", "hub"] | None:
    """Return where the recipe's tokenizer is, or None if it is neither on a local disk nor possibly on the hub."""
    path = Path(recipe.tokenizer)
    if path.is_file() or any((path / name).is_file() for name in NAMES):
        return "disk"
    is_path = recipe.vocab_size or path.parent.is_dir() or not HUB_NAME.fullmatch(recipe.tokenizer)
    return None if is_path else "hub"


def load_tokenizer(recipe: Recipe) -> Tokenizer:
    """Load the recipe's tokenizer. If there is none, raises InputError with the command that trains one."""
    missing = f"{recipe.tokenizer}: no tokenizer here; run: {recipe.command('tokenizer train')}"
    place = tokenizer_place(recipe)
    if place is None:
        raise InputError(missing)
    try:
        return Tokenizer.load(recipe.tokenizer)
    except InputError as error:
        if place == "disk":
            raise
        hub = "connect to the hub, or set HF_TOKEN for a private or gated repository"
        raise InputError(f"{missing} (for a tokenizer on the hub, {hub})") from error


def open_store(recipe: Recipe) -> TokenStore:
    """Open the recipe's token store. If it is not complete, raises InputError with the command that prepares it."""
    if problem := TokenStore.problem(recipe.data.store):
        raise InputError(f"{recipe.data.store}: the token store {problem}; run: {recipe.command('prepare')}")
    return TokenStore.open(recipe.data.store)


def check_training(recipe: Recipe, ranks: int = 1) -> list[str]:
    """Check a recipe, its store and its tokenizer before training on `ranks` processes; return the warnings.

    Raises InputError if the store or the tokenizer is missing, or if training or a milestone's release would fail.
    """
    tokenizer, store = load_tokenizer(recipe), open_store(recipe)
    warnings = check_recipe(recipe, tokenizer)
    tasks = recipe.train.evaluated_tasks  # `train` loads their items before it writes anything
    if recipe.has_milestones:
        from tinyllama.release.formats import check_format_libraries

        check_format_libraries(recipe.release.formats)
        tasks += recipe.release.tasks
    if tasks:
        from tinyllama.evaluate.evaluation import check_tasks

        check_tasks(tasks)
    recipe.train.sequences_per_rank(ranks)
    return [*warnings, *recipe_warnings(recipe, ranks, store)]


def check_stages(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Check what the stages of a recipe need before the first one starts.

    Return the tasks of `release.tasks` that can be scored on this machine, and a reason per task that cannot. Raises
    InputError if a stage is not possible in this process, or if training, releases or their verification lack a library
    or a task of `train.evaluate_tasks`.
    """
    from tinyllama.evaluate.evaluation import available_tasks, check_tasks
    from tinyllama.release.formats import LIBRARIES, check_format_libraries, require_libraries
    from tinyllama.tracking.trackers import check_trackers

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("run: uses one process; under torchrun, use `train`, then continue with `run` in one process")
    if recipe.data.executor == "slurm" and not TokenStore.exists(recipe.data.store):
        remedy = f"run `{recipe.command('prepare')}`, and this command again when the store is complete"
        raise InputError(f"data.executor: slurm prepares the store in later jobs; {remedy}")
    check_trackers(recipe.track)
    check_format_libraries(recipe.release.formats)
    require_libraries(LIBRARIES["huggingface"])  # which `verify` uses
    _check_tasks(recipe.release)
    if recipe.has_milestones and recipe.release.tasks:
        check_tasks(recipe.release.tasks)
    if recipe.train.evaluated_tasks and (reasons := available_tasks(recipe.train.evaluated_tasks)[1]):
        raise InputError(f"train.evaluate_tasks: {reasons[0]}")
    return available_tasks(recipe.release.tasks)


def check_recipe(recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
    """Check a recipe; raise InputError for the first fatal finding, or return the messages of all findings."""
    warnings = []
    for finding in findings(recipe, tokenizer):
        if finding.stops:
            raise finding.problem
        warnings.append(str(finding.problem))
    return warnings


def findings(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Yield the problems of a recipe and its tokenizer, the most important first."""
    special, release = recipe.data.document, recipe.release
    checks: list[tuple[str, bool, Callable[[], object]]] = [
        ("tokenizer.json", True, partial(tokenizer.check_formats, ["huggingface"])),
        ("data.document", True, lambda: list(tokenizer.encode_documents((), special.bos, special.eos))),
        ("initial weights", True, partial(_check_initial_weights, recipe, tokenizer)),
        ("train.float8", True, partial(check_float8, recipe)),
        ("train.evaluate_tasks", True, partial(_check_task_names, recipe.train.evaluated_tasks)),
        *(
            (f"release.formats: {name}", recipe.has_milestones, partial(tokenizer.check_formats, [name]))
            for name in release.formats
        ),
    ]
    if recipe.has_milestones:
        checks += [
            ("release.tasks", True, partial(_check_tasks, release)),
            ("release.baselines", False, partial(_check_baselines, release.baselines)),
        ]
    for what, stops, call in checks:
        try:
            call()
        except InputError as problem:
            yield Finding(what, problem, stops)
            if what == "tokenizer.json":  # all formats are converted from tokenizer.json
                return


def _check_initial_weights(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Check local initial weights, unless the run has started; `train` downloads and checks weights on the hub."""
    initial = recipe.train.initial_weights
    if initial is None or not Path(initial).exists():
        return
    from tinyllama.train.setup import open_initial_weights

    if RunDir.of_recipe(recipe).initial_weights() is None:
        open_initial_weights(recipe, tokenizer)


def check_float8(recipe: Recipe) -> None:
    """Check that float8 matrix products support the sizes of the model's matrices. Raises InputError otherwise."""
    shape = recipe.model
    heads = {"heads": shape.heads, "(heads + 2 kv_heads)": shape.heads + 2 * shape.kv_heads}
    sizes = {"dim": shape.dim, "ffn_dim": shape.ffn_dim}
    sizes |= {f"{name} x head_dim": count * shape.head_dim for name, count in heads.items()}
    for name, size in sizes.items() if recipe.train.float8 else ():
        if size % 16:
            raise InputError(
                f"train.float8: model.{name} is {size}, but float8 matrix products need multiples of 16; change the "
                "model, or remove train.float8"
            )


def _check_tasks(release: Release) -> None:
    """Check the names of tasks if lm-eval is installed; `train` reports a missing installation."""
    if release.tasks and release.limit == 1:
        raise InputError("release.limit: 1 item of each task gives no standard error; raise the limit to at least 2")
    _check_task_names(release.tasks)


def _check_task_names(tasks: Sequence[str]) -> None:
    if tasks and find_spec("lm_eval"):
        from tinyllama.evaluate.tasks import check_task_names

        check_task_names(tasks)


def _check_baselines(names: Sequence[str]) -> None:
    """Check the names of baselines. A missing folder causes only a warning: a later job may create the folder."""
    for name in names:
        if not Path(name).exists() and not HUB_NAME.fullmatch(name):
            raise InputError(
                f"release.baselines: {name} is neither a folder nor OWNER/NAME on the hub; correct the name, or "
                "create the folder before the first milestone"
            )


def recipe_warnings(recipe: Recipe, ranks: int | None = None, store: TokenStore | None = None) -> list[str]:
    """Return warnings, as lines `place: problem; remedy`, about settings that do not match the run.

    Warnings about the number of ranks need `ranks`; warnings about validation need `store`.
    """
    warnings = [*_schedule_warnings(recipe), *_interval_warnings(recipe), *_token_count_warnings(recipe)]
    warnings += _micro_batch_warnings(recipe, ranks) if ranks else ()
    return [*warnings, *(_validation_warnings(recipe, store) if store else ())]


def _schedule_warnings(recipe: Recipe) -> Iterator[str]:
    """Yield a warning if the learning rate does not reach its peak or its final rate."""
    train, steps = recipe.train, recipe.train.steps
    schedule, peak, final = train.schedule, train.optimizer.learning_rate, train.schedule.final_learning_rate
    highest = max(map(train.learning_rate_at, range(max(1, min(schedule.warmup_steps, steps)))))
    last = train.learning_rate_at(steps - 1)
    tolerance = _LEARNING_RATE_TOLERANCE * peak
    if highest < peak - tolerance or abs(last - final) > tolerance:
        lower = " or decay_fraction" if schedule.name == "wsd" else ""
        yield (
            f"train.schedule: with {schedule.warmup_steps:,} warm-up steps in a run of {steps:,} the learning rate "
            f"rises to {highest:.3g} (the peak is {peak:g}) and ends at {last:.3g} (the final rate is {final:g}); "
            f"lower warmup_steps{lower}, or raise train.tokens"
        )


def _interval_warnings(recipe: Recipe) -> Iterator[str]:
    """Yield a warning for each interval that is longer than the run."""
    steps = recipe.train.steps
    if (every := recipe.train.validate_every_steps) > steps:
        problem = f"{every:,} is more than the {steps:,} steps of the run, so only the last step is validated"
        yield f"train.validate_every_steps: {problem}; lower it"
    if (interval := recipe.train.evaluate_every_steps) and interval > steps:
        problem = f"{interval:,} is more than the {steps:,} steps of the run, so only the last step is evaluated"
        yield f"train.evaluate_every_steps: {problem}; lower it"
    has_milestone = any(step < steps for step in recipe.milestone_steps())
    if (every := recipe.checkpoint.every_steps) > steps and not has_milestone:
        problem = f"{every:,} is more than the {steps:,} steps of the run, so an interrupted run starts from step 0"
        yield f"checkpoint.every_steps: {problem}; lower it"


def _token_count_warnings(recipe: Recipe) -> Iterator[str]:
    """Yield a warning for each field with a token count that the run does not reach."""
    last = recipe.train.steps * recipe.train.batch_tokens
    every = recipe.release.every_tokens
    fields = {
        "release.at_tokens": recipe.release.at_tokens,
        "release.every_tokens": (every,) if every else (),
        "data.stages": tuple(stage.from_tokens for stage in recipe.data.stages),
    }
    for field, counts in fields.items():
        if beyond := sorted(count for count in counts if count > last):
            more = f" and {len(beyond) - 1} larger counts" if len(beyond) > 1 else ""
            problem = f"{beyond[0]:,} tokens{more} are never reached, because the run ends at {last:,}"
            yield f"{field}: {problem}; remove these counts, or raise train.tokens"


def _micro_batch_warnings(recipe: Recipe, ranks: int) -> Iterator[str]:
    """Yield a warning if the sequences per rank have no divisor close to the micro-batch size."""
    train = recipe.train
    if train.batch_sequences % ranks:
        return  # `sequences_per_rank` raises an error for this case
    per_rank, size = train.sequences_per_rank(ranks), train.effective_micro_batch_size(ranks)
    if 2 * size <= min(per_rank, train.micro_batch_sequences):
        yield (
            f"train.micro_batch_sequences: {size} is used, because the {per_rank} sequences per rank have no larger "
            f"divisor up to {train.micro_batch_sequences}; for faster training, change train.batch_sequences"
        )


def _validation_warnings(recipe: Recipe, store: TokenStore) -> Iterator[str]:
    """Yield a warning for each source with too little validation text."""
    for name, share in zip(recipe.data.sources, mixture_schedule(recipe)[0].shares, strict=True):
        if share and not store.num_validation_sequences(name, recipe.train.sequence_length):
            remedy = f"{holdout_remedy(store, name)}, or shorten train.sequence_length"
            yield f"{recipe.data.store}/{name}: too little text held out for validation; {remedy}"
