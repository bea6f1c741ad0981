"""What `tinyllama release` does with what it is given: release it, unless it is a release, and push it if told to."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tinyllama.errors import InputError
from tinyllama.evaluate.evaluation import BATCH_SIZE, evaluate_and_save
from tinyllama.evaluate.results import format_evaluation
from tinyllama.release import find_checkpoint, release, update_card
from tinyllama.release.convert import ALL_FORMATS, release_foreign
from tinyllama.release.index import is_release_of
from tinyllama.release.push import push


def release_model(
    source: str,
    step: int | None,
    formats: Sequence[str] | None,
    average: int | None,
    average_decay: float | None,
    force: bool,
    push_to: str | None,
    public: bool,
) -> Iterator[str]:
    """Do it, and say what was done, a line each. Raises InputError as `release`, `release_foreign` and `push` do."""
    if public and not push_to:
        raise InputError("release: --public says how a repository is made; name it with --push OWNER/NAME")
    changing = force or any(option is not None for option in (formats, average, average_decay))
    folder = _released(Path(source), step) if push_to and not changing else None
    if folder is None:
        if _is_foreign(Path(source)):
            if (step, average, average_decay) != (None, None, None):
                raise InputError(
                    f"{source}: no run here, and pretrained weights have no steps; correct the run's name, or remove "
                    "--step, --average and --average-decay"
                )
            folder = release_foreign(source, formats or ALL_FORMATS, force)
        else:
            options: dict[str, Any] = {"formats": formats, "average": average, "average_decay": average_decay}
            folder = release(source, step=step, force=force, in_transformers=True, **options)
        yield f"release: {folder}"
    if push_to:
        yield f"pushed: {push(folder, push_to, public)}"


def evaluate_model(
    source: str,
    tasks: Sequence[str],
    limit: int | None,
    precision: torch.dtype,
    num_fewshot: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> str:
    """Evaluate a model, save its scores, and update the card if it is a release; return the text to print.

    Under torchrun, ranks other than 0 return an empty text. Raises InputError as `evaluate` does.
    """
    saved = evaluate_and_save(source, tasks, limit, precision, num_fewshot, batch_size)
    if saved is None:
        return ""
    evaluation, path = saved
    if path.with_name("release.json").is_file():
        update_card(path.parent)
    return "\n".join([*format_evaluation(evaluation), f"saved: {path}"])


def _released(source: Path, step: int | None) -> Path | None:
    """The release to push that is there already: given itself, or that of the checkpoint that would be released."""
    if (source / "release.json").is_file() and step is None:
        return source
    if _is_foreign(source):
        return None
    checkpoint = find_checkpoint(source, step)
    folder = checkpoint.parent.parent / "releases" / checkpoint.name
    return folder if is_release_of(folder, checkpoint) else None


def _is_foreign(source: Path) -> bool:
    """Whether it is a Hugging Face folder, a release, or no folder here: then it is the hub's to know."""
    return any((source / name).is_file() for name in ("config.json", "release.json")) or not source.exists()
