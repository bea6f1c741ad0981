"""Public Python functions that combine several packages; the command line calls them too.

Each function imports its modules when it is called, so that `import tinyllama` does not load torch, which takes
seconds.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.errors import InputError
from tinyllama.formatting import echo
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import ReleaseDir

if TYPE_CHECKING:
    import torch

    from tinyllama.data.store import TokenStore
    from tinyllama.evaluate.results import Evaluation
    from tinyllama.model.generation import Sampling
    from tinyllama.model.llama import Llama
    from tinyllama.tokenizer import Tokenizer

# ruff: noqa: PLC0415


def prepare_store(recipe: Recipe, strict: bool = False) -> "TokenStore | None":
    """Check the recipe, print warnings, and write the recipe's token store, or complete an unfinished one.

    Raises the same errors as `prepare.pipeline.build_store`. Also raises InputError if training with the recipe, or the
    release of a milestone checkpoint, would fail.
    """
    from tinyllama.preflight import check_recipe
    from tinyllama.prepare import pipeline
    from tinyllama.tokenizer import Tokenizer

    for warning in check_recipe(recipe, Tokenizer.load(recipe.tokenizer)):
        echo(warning, to_stderr=True)
    return pipeline.build_store(recipe, strict)


def train_model(recipe: Recipe, *, allow_change: bool = False) -> Path:
    """Check the recipe, print warnings, and train its model or resume its run; return the run's folder.

    Under torchrun every rank calls this function. Raises the same errors as `train.loop.train`. Also raises InputError
    if the release of a milestone checkpoint would fail.
    """
    from tinyllama.preflight import check_training
    from tinyllama.train.loop import train

    warnings = check_training(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    for warning in warnings if os.environ.get("RANK", "0") == "0" else ():
        echo(warning, to_stderr=True)
    return train(recipe, allow_change=allow_change)


def release_model(
    source: str,
    step: int | None = None,
    *,
    formats: Sequence[str] | None = None,
    average: int | None = None,
    average_decay: float | None = None,
    force: bool = False,
    push: str | None = None,
    public: bool = False,
) -> Iterator[str]:
    """Release a run, a checkpoint or external weights; yield one line of output for the release and one for the push.

    If `push` names a repository on the hub, the release is pushed to this repository. An existing release of the same
    checkpoint is pushed unchanged, unless `force`, `formats`, `average` or `average_decay` is given. Raises the same
    errors as `release_run`, `release_external_weights` and `push_release`.
    """
    from tinyllama.release.convert import ALL_FORMATS, release_external_weights
    from tinyllama.release.push import push_release
    from tinyllama.release.release import release_run

    if public and not push:
        raise InputError("release: --public makes a new repository public; name the repository with --push OWNER/NAME")
    path, options = Path(source), dict[str, Any](formats=formats, average=average, average_decay=average_decay)
    is_external = ReleaseDir(path).exists or (path / "config.json").is_file() or not path.exists()
    folder = None
    if push and not force and all(option is None for option in options.values()):
        folder = _existing_release(path, step, is_external)
    if folder is None:
        if is_external and (step, average, average_decay) != (None, None, None):
            raise InputError(
                f"{source}: no run here, and pretrained weights have no steps; correct the run's name, or remove "
                "--step, --average and --average-decay"
            )
        if is_external:
            folder = release_external_weights(source, formats or ALL_FORMATS, force)
        else:
            folder = release_run(source, step=step, force=force, in_transformers=True, **options)
        yield f"release: {folder}"
    if push:
        yield f"pushed: {push_release(folder, push, public)}"


def _existing_release(source: Path, step: int | None, is_external: bool) -> Path | None:
    """Return `source` if it is a release, else the folder of the checkpoint's existing release, or None."""
    from tinyllama.release.release import verified_checkpoint

    if ReleaseDir(source).exists and step is None:
        return source
    if is_external:
        return None
    checkpoint = verified_checkpoint(source, step)
    release = checkpoint.run.releases.release(checkpoint.name)
    return release.path if checkpoint.is_released_as(release) else None


def evaluate_model(
    source: str,
    tasks: Sequence[str],
    limit: int | None,
    precision: "torch.dtype",
    num_fewshot: int | None = None,
    batch_size: int = 64,
) -> "tuple[Evaluation, Path] | None":
    """Evaluate a model, and save its scores; return the scores and the path of the file.

    If the model is a release, its model card is updated. Under torchrun, ranks other than 0 return None.
    Raises the same errors as `evaluate`.
    """
    from tinyllama.evaluate.evaluation import evaluate_and_save
    from tinyllama.release.card import update_card

    saved = evaluate_and_save(source, tasks, limit, precision, num_fewshot, batch_size)
    if saved and ReleaseDir(saved[1].parent).exists:
        update_card(saved[1].parent)
    return saved


def generate_text(source: str, prompt: str, max_new_tokens: int, **sampling: Any) -> Iterator[str]:
    """Load a model; yield the prompt, then the generated continuation in parts.

    `sampling` has values for the fields of `model.generation.Sampling`; without them, the continuation is greedy.
    Raises the same errors as `stream_samples`.
    """
    return next(stream_samples(source, prompt, max_new_tokens, **sampling))


def stream_samples(
    source: str, prompt: str, max_new_tokens: int, num_samples: int = 1, **sampling: Any
) -> Iterator[Iterator[str]]:
    """Load a model; yield one iterator per sample, over the prompt and the parts of its continuation.

    Sample i, counted from 0, has the seed `seed + i`. See `loading.resolve_model` for the values of `source`. Raises
    InputError if `source` is not a model, and the same errors as `Sampling` and `model.generation.generate`.
    """
    from tinyllama.loading import load_model, load_tokenizer
    from tinyllama.model.generation import Sampling

    first = Sampling(**sampling)
    if num_samples < 1:
        raise InputError(f"num_samples: {num_samples} is out of range; give at least 1")
    model, tokenizer = load_model(source), load_tokenizer(source)
    for index in range(num_samples):
        yield _stream_text(model, tokenizer, prompt, max_new_tokens, replace(first, seed=first.seed + index))


def _stream_text(
    model: "Llama", tokenizer: "Tokenizer", prompt: str, max_new_tokens: int, sampling: "Sampling"
) -> Iterator[str]:
    from tinyllama.model.generation import generate, stream_decode

    ids = tokenizer.bos_prefix + tokenizer.encode(prompt)
    tokens = generate(model, ids, max_new_tokens, sampling, stop_id=tokenizer.eos_id)
    first = list(islice(tokens, 1))  # `generate` checks its arguments when it computes the first token
    yield prompt
    yield from stream_decode(tokenizer, ids, chain(first, tokens))
