"""The commands `tinyllama release` and `tinyllama evaluate`, and the release of a milestone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tinyllama.errors import InputError, run_and_get_exit_status
from tinyllama.evaluate.evaluation import BATCH_SIZE, evaluate, evaluate_and_save
from tinyllama.evaluate.results import format_evaluation
from tinyllama.model.llama import PRECISIONS
from tinyllama.progress import set_quiet
from tinyllama.release.card import update_card, update_cards
from tinyllama.release.convert import ALL_FORMATS, release_external_weights
from tinyllama.release.metadata import covers_recipe
from tinyllama.release.push import push
from tinyllama.release.release import release_run, verified_checkpoint
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import ReleaseDir, RunDir


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
    """Release a run, a checkpoint or external weights; yield a line of output per action.

    With `push_to`, the release is then pushed to this repository of the hub. An existing release of the same checkpoint
    is pushed unchanged, unless `force` or a release option is given. Raises the same errors as `release_run`,
    `release_external_weights` and `push`.
    """
    if public and not push_to:
        raise InputError("release: --public makes a new repository public; name the repository with --push OWNER/NAME")
    is_external = _is_external(Path(source))
    options: dict[str, Any] = {"formats": formats, "average": average, "average_decay": average_decay}
    folder = None
    if push_to and not force and all(option is None for option in options.values()):
        folder = _existing_release(Path(source), step, is_external)
    if folder is None:
        if is_external:
            if (step, average, average_decay) != (None, None, None):
                raise InputError(
                    f"{source}: no run here, and pretrained weights have no steps; correct the run's name, or remove "
                    "--step, --average and --average-decay"
                )
            folder = release_external_weights(source, formats or ALL_FORMATS, force)
        else:
            folder = release_run(source, step=step, force=force, in_transformers=True, **options)
        yield f"release: {folder}"
    if push_to:
        yield f"pushed: {push(folder, push_to, public)}"


def _is_external(source: Path) -> bool:
    """Return whether the source is a Hugging Face folder, a release or a hub name (not a local folder)."""
    return ReleaseDir(source).exists or (source / "config.json").is_file() or not source.exists()


def _existing_release(source: Path, step: int | None, is_external: bool) -> Path | None:
    """Return the folder of an existing release: `source` itself, or the release of the checkpoint to release."""
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
    precision: torch.dtype,
    num_fewshot: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> str:
    """Evaluate a model, save its scores, and update the card of a release; return the text to print.

    Under torchrun, ranks other than 0 return an empty string. Raises the same errors as `evaluate`.
    """
    saved = evaluate_and_save(source, tasks, limit, precision, num_fewshot, batch_size)
    if saved is None:
        return ""
    evaluation, path = saved
    if ReleaseDir(path.parent).exists:
        update_card(path.parent)
    return "\n".join([*format_evaluation(evaluation), f"saved: {path}"])


def release_milestone(run: RunDir, step: int) -> None:
    """Release the checkpoint of a step, and score it and the recipe's baselines; skip finished parts."""
    checkpoint, config, precision = run.checkpoint(step), run.recipe().release, PRECISIONS[run.recipe().train.precision]
    release = run.releases.release(checkpoint.name)
    if not checkpoint.is_released_as(release):
        release_run(run.path, step=step, force=release.exists)
    elif step not in {event["step"] for event in run.events() if event["event"] == "release"}:
        RunLog(run).event("release", step, folder=str(release.path))  # the process was killed before it wrote the event
    wanted = config.model_dump()
    if not covers_recipe(release.evaluation(), wanted):
        evaluate_and_save(str(release.path), config.tasks, config.limit, precision)
    for name in config.baselines:
        if not covers_recipe(run.releases.baseline_evaluation(name), wanted):
            evaluation = evaluate(name, config.tasks, limit=config.limit, precision=precision)
            evaluation.save(run.releases.baseline_path(name))
    update_cards(run.releases)


def main(run: str, step: str) -> int:
    """Release a milestone in this process, which runs next to training; return the exit status.

    The last line on standard error is the reason for a failure. Status 2 means invalid input; training does not retry
    in this case. A full disk has status 1, since the disk may have space a minute later.
    """
    set_quiet()
    return run_and_get_exit_status(lambda: release_milestone(RunDir(Path(run)), int(step)), system_status=1)
