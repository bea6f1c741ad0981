"""Releases of checkpoints: `RUN/releases/step-00000100/` contains one folder per format, and release.json.

The weights are exported once, to a Hugging Face folder; the module `formats` converts this folder to the other formats.
The release is written to a hidden folder, which is renamed when the release is complete. The model cards of all
releases and the table of releases in releases.json are then updated.
"""

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import ValidationError
from safetensors.torch import save_file

from tinyllama.errors import InputError, RunStoppedError, run_and_get_exit_status, translate_damage_errors
from tinyllama.evaluate.evaluation import evaluate, evaluate_and_save
from tinyllama.files import atomic_directory, exclusive_lock, reject_symlinks, write_json
from tinyllama.loading import load_model, load_tokenizer
from tinyllama.model.llama import PRECISIONS, Llama
from tinyllama.model.weights import config_to_hugging_face, to_hugging_face
from tinyllama.plots.charts import loss_plot
from tinyllama.progress import BYTES, poll_progress, set_quiet
from tinyllama.recipe import Release
from tinyllama.recipe.loading import format_validation_error
from tinyllama.release.card import update_cards, write_card
from tinyllama.release.formats import FORMAT_BYTES, check_format_libraries, release_bytes, smoke_test, write_formats
from tinyllama.release.metadata import build_release_metadata, check_destination, covers_recipe, hash_files
from tinyllama.release.verify import compute_reference_outputs
from tinyllama.runs.checkpoint import load_weights
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import CheckpointDir, ReleaseDir, RunDir
from tinyllama.tokenizer import Tokenizer

SHARD_BYTES = 5 * 10**9


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

    `source` is a run or a checkpoint. `formats`, `average` and `average_decay` override the recipe's fields (see
    `recipe.Release`). Each GGUF and CTranslate2 file is run once in its engine. With `in_transformers`, the Hugging
    Face folder is also run in transformers, which takes several seconds. Raises InputError if the checkpoint is damaged
    or does not match its run, if a format's library is missing, or if the release exists and `force` is false. Raises
    RunStoppedError if an engine rejects a file. If an engine crashes, the release is written before RunStoppedError is
    raised.
    """
    checkpoint = find_checkpoint(Path(source), step)
    if damage := checkpoint.find_damage():
        raise InputError(f"{damage[0]}; release another step, or train this step again")
    run = checkpoint.run
    if not run.recipe_path.is_file():
        raise InputError(f"{checkpoint.path}: not in a run; a release needs the run's store.json and metrics.jsonl")
    reject_symlinks(run.path, is_run=True)
    config = _release_config(run.recipe().release, formats, average, average_decay)
    release = run.releases.release(checkpoint.name)
    check_destination(release, force)
    check_format_libraries(config.formats)
    tokenizer = load_tokenizer(checkpoint.path)
    tokenizer.check_formats(config.formats)
    averaged = averaged_checkpoints(checkpoint, config.average_checkpoints, exactly=average is not None)
    metadata = build_release_metadata(checkpoint, averaged, config)
    locked = f"{run.releases.path}: another process is releasing this run"
    with exclusive_lock(run.releases.lock_path, locked), atomic_directory(release.path) as part:
        with show_release_progress(part, release.path, metadata["parameters"], config.formats):
            model = load_model(checkpoint.path)
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
    update_cards(run.releases)  # last, because a milestone in releases.json is not processed again after a crash
    if crash:
        raise RunStoppedError(f"{release.path}: released, but {crash}")
    return release.path


def find_checkpoint(source: Path, step: int | None) -> CheckpointDir:
    """Find the checkpoint to release in a run or a checkpoint. Raises InputError if the checkpoint is missing."""
    checkpoint = CheckpointDir(source)
    if checkpoint.is_committed:
        if step not in (None, checkpoint.step):
            raise InputError(f"{source}: the checkpoint of step {checkpoint.step}, not of {step}; remove --step")
    elif RunDir(source).recipe_path.is_file():
        checkpoint = RunDir(source).find_checkpoint(step)
    else:
        raise InputError(f"{source}: neither a run nor a checkpoint; give the folder of a run, such as runs/demo")
    return checkpoint


def _release_config(config: Release, *options: Any) -> Release:
    """Return the `release` section of a recipe, with the fields replaced by those `options` that are not None.

    Raises InputError if an option is invalid.
    """
    names = ("formats", "average_checkpoints", "average_decay")
    fields = {name: value for name, value in zip(names, options, strict=True) if value is not None}
    try:
        return Release.model_validate(config.model_dump() | fields)
    except ValidationError as error:
        raise InputError(f"release: {format_validation_error(error, Release)}") from None


def averaged_checkpoints(checkpoint: CheckpointDir, count: int, exactly: bool = True) -> list[CheckpointDir]:
    """Return the `count` newest checkpoints of a run up to and including `checkpoint`, oldest first.

    Checkpoints before a gap of more than `checkpoint.every_steps` steps are excluded: with such old weights, the
    average is worse than the newest checkpoint. If fewer than `count` checkpoints remain, return all of them, or raise
    InputError if `exactly` is true.
    """
    if count == 1:
        return [checkpoint]
    run = checkpoint.run
    *older, newest = (other for other in run.checkpoints() if other.step <= checkpoint.step)
    max_gap, chosen = run.recipe().checkpoint.every_steps, [newest]
    for other in reversed(older):
        if len(chosen) == count or chosen[0].step - other.step > max_gap:
            break
        chosen.insert(0, other)
    if len(chosen) < count and exactly:
        steps = ", ".join(str(other.step) for other in chosen)
        raise InputError(
            f"{run.path}: --average is {count}, but the number of consecutive checkpoints up to "
            f"{checkpoint.name} is {len(chosen)} (step {steps}); give at most {len(chosen)}, or raise checkpoint.keep"
        )
    return chosen


def averaging_weights(count: int, decay: float) -> list[float]:
    """Return the averaging weights of `count` checkpoints, oldest first; the weights sum to 1.

    Each weight is `decay` times the weight of the next newer checkpoint.
    """
    weights = [decay**age for age in reversed(range(count))]
    return [weight / sum(weights) for weight in weights]


@torch.no_grad()
def load_average(model: Llama, checkpoints: Sequence[CheckpointDir], decay: float) -> None:
    """Load the weighted average of `checkpoints`, sorted oldest first, into `model` (see `averaging_weights`).

    Checkpoints are verified and read one at a time, so memory holds one model and the average, both in float32. The
    average can replace a learning-rate cooldown (LAWA, Kaddour 2022, arXiv:2209.14981). A single checkpoint is loaded
    unchanged. Raises InputError if the checkpoints are from different runs, if a checkpoint does not match its hashes,
    or if its shapes differ from those of the model.
    """
    first, last = checkpoints[0], checkpoints[-1]
    if len({checkpoint.run for checkpoint in checkpoints}) != 1:
        raise InputError(f"{first.path}: not of the same run as {last.path}; average the checkpoints of one run")
    load_weights(last, model)
    if len(checkpoints) == 1:
        return
    *older, newest = averaging_weights(len(checkpoints), decay)
    average = {name: tensor * newest for name, tensor in model.state_dict().items()}
    for checkpoint, weight in zip(checkpoints[:-1], older, strict=True):
        load_weights(checkpoint, model)
        for name, tensor in model.state_dict().items():
            average[name].add_(tensor, alpha=weight)
    model.load_state_dict(average)


def write_hugging_face(folder: Path, model: Llama, tokenizer: Tokenizer, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model and its tokenizer into a new Hugging Face folder, which transformers loads without extra code.

    The weights are written in bf16, in files of at most `shard_bytes`. Memory holds the model and the tensors of one
    file at a time.
    """
    folder.mkdir(parents=True)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    write_json(folder / "config.json", config_to_hugging_face(model.config, model.vocab_size, bos, eos))
    # EOS pads batches, since Llama 2's vocabulary has no padding token
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos})
    tensors = dict(to_hugging_face(model.state_dict(), model.config))
    sizes = {name: torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta") for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: tensors[name].to("cpu", torch.bfloat16).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors makes files readable by the owner only
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    tokenizer.save(folder, context=model.config.context_length)


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


def release_milestone(run: RunDir, step: int) -> None:
    """Release a step's checkpoint, and evaluate the release and the recipe's baselines; skip what already exists."""
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
    """Release a milestone in this sidecar process; return the exit status.

    The last line on standard error gives the reason for a failure. Status 2 means invalid input, after which training
    does not retry. A full disk causes status 1, so that training retries the release; the disk may have space by then.
    """
    set_quiet()
    return run_and_get_exit_status(lambda: release_milestone(RunDir(Path(run)), int(step)), system_status=1)
