"""Release a checkpoint of a run: `RUN/releases/step-00000100/` with one folder per format and release.json.

The release is written to a hidden folder, which is renamed when it is complete. The card of every release and the
table in releases.json are then updated.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tinyllama.errors import InputError, RunStoppedError, translate_damage_errors
from tinyllama.files import atomic_directory, exclusive_lock, reject_symlinks, write_json
from tinyllama.loading import load_model, load_tokenizer
from tinyllama.plots.charts import loss_plot
from tinyllama.progress import BYTES, poll_progress
from tinyllama.recipe import Release
from tinyllama.recipe.loading import format_validation_error
from tinyllama.release.average import averaged_checkpoints, load_average
from tinyllama.release.card import update_cards, write_card
from tinyllama.release.formats import FORMAT_BYTES, check_format_libraries, release_bytes, smoke_test, write_formats
from tinyllama.release.huggingface import write_hugging_face
from tinyllama.release.metadata import build_release_metadata, check_destination, hash_files
from tinyllama.release.verify import compute_reference_outputs
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import CheckpointDir, ReleaseDir, RunDir


def release_run(
    source: str | Path,
    *,
    step: int | None = None,
    force: bool = False,
    formats: Sequence[str] | None = None,
    average: int | None = None,
    average_decay: float | None = None,
    in_transformers: bool = False,
) -> Path:
    """Release the checkpoint of `step`, or by default the newest committed checkpoint; return the release's folder.

    `source` is a run or a checkpoint. `formats`, `average` and `average_decay` replace the recipe's fields (see
    `schema.Release`). Each GGUF and CTranslate2 file is loaded once in its engine. With `in_transformers`, transformers
    also loads the Hugging Face folder, which takes seconds. Raises InputError if the checkpoint is missing, damaged or
    does not match its run. Raises InputError also if a format's library is missing, or if the release exists and
    `force` is false. Raises RunStoppedError if an engine rejects a file. If an engine crashes, the release is written
    before RunStoppedError is raised.
    """
    checkpoint = verified_checkpoint(Path(source), step)
    run = checkpoint.run
    if not run.recipe_path.is_file():
        raise InputError(f"{checkpoint.path}: not in a run; a release needs the run's store.json and metrics.jsonl")
    reject_symlinks(run.path)
    config = _release_config(run.recipe().release, formats, average, average_decay)
    release = run.releases.release(checkpoint.name)
    check_destination(release, force)
    check_format_libraries(config.formats)
    load_tokenizer(checkpoint.path).check_formats(config.formats)
    averaged = averaged_checkpoints(checkpoint, config.average_checkpoints, exactly=average is not None)
    metadata = build_release_metadata(checkpoint, averaged, config)
    locked = f"{run.releases.path}: another process is releasing this run"
    with exclusive_lock(run.releases.lock_path, locked), atomic_directory(release.path) as part:
        with show_release_progress(part, release.path, metadata["parameters"], config.formats):
            model, tokenizer = load_model(checkpoint.path), load_tokenizer(checkpoint.path)
            if len(averaged) > 1:
                load_average(model, averaged, config.average_decay)
            write_hugging_face(part / "huggingface", model, tokenizer)
            metadata["reference"] = compute_reference_outputs(model, tokenizer)
            del model
            write_formats(part, config.formats, metadata["name"])
            crash = smoke_test(part, metadata["reference"], in_transformers)
        with translate_damage_errors(run.path):
            loss_plot(run.metrics(metadata["step"]), part / "huggingface" / "loss.png")
        write_json(ReleaseDir(part).metadata_path, {**metadata, "files": hash_files(part)})
        write_card(ReleaseDir(part), {"releases": [], "baselines": []})
    RunLog(run).event("release", metadata["step"], folder=str(release.path))
    update_cards(run.releases)  # after the event: a milestone in releases.json is not processed again after a crash
    if crash:
        raise RunStoppedError(f"{release.path}: released, but {crash}")
    return release.path


def verified_checkpoint(source: Path, step: int | None) -> CheckpointDir:
    """Find the checkpoint to release and verify its hashes. Raises InputError for a missing or damaged checkpoint."""
    checkpoint = CheckpointDir(source)
    if checkpoint.is_committed:
        if step not in (None, checkpoint.step):
            raise InputError(f"{source}: the checkpoint of step {checkpoint.step}, not of {step}; remove --step")
    elif RunDir(source).recipe_path.is_file():
        checkpoint = RunDir(source).find_checkpoint(step)
    else:
        raise InputError(f"{source}: no run and no checkpoint here; give the folder of a run, such as runs/demo")
    if damage := checkpoint.find_damage():
        raise InputError(f"{damage[0]}; release another step, or train this one again")
    return checkpoint


def _release_config(config: Release, *options: Any) -> Release:
    """Return a recipe's `release` with the fields replaced by the `options` that are not None.

    Raises InputError if an option is invalid.
    """
    names = ("formats", "average_checkpoints", "average_decay")
    fields = {name: value for name, value in zip(names, options, strict=True) if value is not None}
    try:
        return Release.model_validate(config.model_dump() | fields)
    except ValidationError as error:
        raise InputError(f"release: {format_validation_error(error, Release)}") from None


@contextmanager
def show_release_progress(part: Path, folder: Path, parameters: int, formats: Collection[str]) -> Iterator[None]:
    """Show a progress bar while the `with` block writes a release to the folder `part`.

    The progress is computed from file sizes, because the libraries that write formats report no progress. For models
    above a few million parameters, the expected total size is accurate to 10 %.
    """
    total = release_bytes(formats, parameters)

    def size(path: Path) -> int:
        try:
            return path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # renamed in the meantime
            return 0

    def description() -> str:
        started = [name for name in FORMAT_BYTES if (part / name).is_dir()]
        return f"writing {started[-1]}" if started else "reading the checkpoint"

    def written() -> int:
        return min(total, sum(map(size, part.rglob("*"))))

    with poll_progress(f"releasing {folder.name}", total, BYTES, written, description, f"to {folder}") as begin:
        begin()
        yield
