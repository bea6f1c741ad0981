"""What the recipe and its tokenizer alone decide, checked before hours of work depend on it.

`prepare` and `train` refuse what training or the release at a milestone could not do; `doctor` lists every finding.
Reads the tokenizer, the initial weights' config.json where they are on this machine, and lm-eval's names of tasks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tinyllama.errors import InputError
from tinyllama.recipe import Recipe
from tinyllama.recipe.train_schema import Release
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import HUB_NAME

# Most recipes need none of what is imported below, and `prepare` should not wait for torch.
# ruff: noqa: PLC0415


@dataclass(frozen=True)
class Finding:
    """Something that would fail later."""

    what: str
    """The field, or the file, that it is about."""
    problem: InputError
    stops: bool
    """Whether training, or the release at a milestone, needs it; else only a later `tinyllama release` does."""


def check(recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
    """Raise InputError for the first finding that stops the recipe; return the others as warnings."""
    warnings = []
    for finding in findings(recipe, tokenizer):
        if finding.stops:
            raise finding.problem
        warnings.append(str(finding.problem))
    return warnings


def findings(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Yield what is wrong with a recipe and its tokenizer, the most important first."""
    markers, release = recipe.data.document, recipe.release
    has_milestones = bool(release.at_tokens or release.every_tokens)
    checks: list[tuple[str, bool, Callable[[], object]]] = [
        ("tokenizer.json", True, partial(tokenizer.check_formats, ["huggingface"])),
        ("data.document", True, lambda: list(tokenizer.encode_documents((), markers.bos, markers.eos))),
        ("initial weights", True, partial(_check_initial_weights, recipe, tokenizer)),
        ("train.float8", True, partial(check_float8, recipe)),
        *(
            (f"release.formats: {name}", has_milestones, partial(tokenizer.check_formats, [name]))
            for name in release.formats
        ),
    ]
    if has_milestones:
        checks += [
            ("release.tasks", True, partial(_check_tasks, release)),
            ("release.baselines", False, partial(_check_baselines, release.baselines)),
        ]
    for what, stops, call in checks:
        try:
            call()
        except InputError as problem:
            yield Finding(what, problem, stops)
            if what == "tokenizer.json":  # every format is made from it
                return


def _check_initial_weights(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Those on the hub are fetched, and checked, by `train`; a run that has begun no longer needs them."""
    initial = recipe.train.initial_weights
    if initial is None or not Path(initial).exists():
        return
    from tinyllama.train.setup import open_initial_weights, read_initial_weights_info, run_folder

    if read_initial_weights_info(run_folder(recipe)) is None:
        open_initial_weights(recipe, tokenizer)


def check_float8(recipe: Recipe) -> None:
    """Raise InputError where float8 products cannot compute the recipe's blocks."""
    shape = recipe.model
    qkv_rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    sizes = {"dim": shape.dim, "ffn_dim": shape.ffn_dim, "(heads + 2 kv_heads) dim / heads": qkv_rows}
    for name, size in sizes.items() if recipe.train.float8 else ():
        if size % 16:
            raise InputError(
                f"train.float8: model.{name} is {size}, but float8 products need multiples of 16; change the model, or "
                "take float8 out"
            )


def _check_tasks(release: Release) -> None:
    """Without lm-eval nothing is known of a task's name: `train` checks that it is installed."""
    if release.tasks and release.limit == 1:
        raise InputError("release.limit: 1 item of each task gives no standard error; raise it to at least 2")
    if not release.tasks or find_spec("lm_eval") is None:
        return
    from tinyllama.evaluate.tasks import check_task_names

    check_task_names(release.tasks)


def _check_baselines(names: Sequence[str]) -> None:
    """A folder may still be made before the first milestone, so that this is a warning."""
    for name in names:
        if not Path(name).exists() and not HUB_NAME.fullmatch(name):
            raise InputError(
                f"release.baselines: {name} is no folder here and no OWNER/NAME of the hub; correct it, or make it "
                "before the first milestone"
            )
