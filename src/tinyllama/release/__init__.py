"""A checkpoint as a folder that a stranger can use.

Reads a run, writes `RUN/releases/step-00000100/` with a folder a format and `release.json`, and beside them all
`releases.json`. A release is made under a hidden name and renamed when it is whole, so what has a release's name can be
relied on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tinyllama.errors import InputError, RunStoppedError, translate_damage_errors
from tinyllama.files import (
    atomic_directory,
    atomic_write,
    blocking_lock,
    exclusive_lock,
    read_json,
    reject_symlink,
    reject_symlinks,
    write_json,
)
from tinyllama.loading import load_model, load_tokenizer
from tinyllama.plots.charts import loss_plot, score_plot
from tinyllama.recipe import Recipe, Release
from tinyllama.recipe.loading import format_validation_error
from tinyllama.release.average import average_into, averaged_checkpoints
from tinyllama.release.card import model_card
from tinyllama.release.convert import foreign_card
from tinyllama.release.formats import check_formats, load_formats, write_formats
from tinyllama.release.huggingface import write_hugging_face
from tinyllama.release.index import evaluation_of, has_scores, releases_table
from tinyllama.release.lineage import (
    build_release_metadata,
    hash_file,
    hash_files,
    metrics_of_run,
    read_facts,
    refuse_in_the_way,
)
from tinyllama.release.reference import compute_reference_outputs
from tinyllama.release.showing import release_progress
from tinyllama.runs import checkpoint
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir

__all__ = ["refresh_cards", "release", "update_card"]

_HF_DIR = "huggingface"
_CARD = f"{_HF_DIR}/README.md"


def release(
    run: str | Path,
    *,
    step: int | None = None,
    force: bool = False,
    formats: Sequence[str] | None = None,
    average: int | None = None,
    average_decay: float | None = None,
    in_transformers: bool = False,
) -> Path:
    """Release a run's newest committed checkpoint, or that of `step`; return the release's folder.

    `run` may also be a checkpoint's folder. `formats`, `average` and `average_decay` take the place of the recipe's
    (see `recipe_train.Release`). Each file of GGUF and CTranslate2 is loaded once in its engine, and with
    `in_transformers`, which takes seconds more, the Hugging Face folder too.

    Raises InputError where there is no such checkpoint, where it does not match its hashes or its run, where a format's
    library is missing, and where the release is there already, unless `force` replaces it; RunStoppedError where an
    engine fails on a file, and, once the release is written, where one crashes.
    """
    source = find_checkpoint(Path(run), step)
    run = source.parent.parent
    if not (run / "recipe.yaml").is_file():
        told = "whose store.json and metrics.jsonl a release tells of"
        raise InputError(f"{source}: taken out of its run, {told}; release it there")
    reject_symlinks(run)
    wanted = _wanted(Recipe.load(run / "recipe.yaml").release, formats, average, average_decay)
    folder = run / "releases" / source.name
    refuse_in_the_way(folder, force)
    check_formats(wanted.formats)
    load_tokenizer(source).check_formats(wanted.formats)
    averaged = averaged_checkpoints(run, source, wanted.average_checkpoints, exactly=average is not None)
    facts = build_release_metadata(source, averaged, wanted)
    refusal = f"{folder.parent}: another process is releasing this run"
    with exclusive_lock(folder.parent, "lock", refusal), atomic_directory(folder) as part:
        with release_progress(part, folder, facts["parameters"], wanted.formats):
            facts["reference"] = _export(part, source, averaged, wanted.average_decay)
            write_formats(part, wanted.formats, facts["name"])
            crash = load_formats(part, facts["reference"], in_transformers)
        with translate_damage_errors(run):
            loss_plot(metrics_of_run(run, facts["step"]), part / _HF_DIR / "loss.png")
        write_json(part / "release.json", {**facts, "files": hash_files(part)})
        _write_card(part, {"releases": [], "baselines": []})
    RunLog(RunDir(run)).event("release", facts["step"], folder=str(folder))
    rewrite_cards(folder.parent)  # after the event: a milestone that the table has is never looked at again
    if crash:
        raise RunStoppedError(f"{folder}: released, but {crash}")
    return folder


def _wanted(recipe: Release, *given: Any) -> Release:
    """A recipe's `release` with what was given instead of it. Raises InputError for what it could not hold either."""
    names = ("formats", "average_checkpoints", "average_decay")
    fields = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    try:
        return Release.model_validate(recipe.model_dump() | fields)
    except ValidationError as error:
        raise InputError(f"release: {format_validation_error(error, Release)}") from None


def _export(part: Path, source: Path, averaged: list[Path], decay: float) -> dict[str, Any]:
    """Write the Hugging Face folder; return what every other format must agree with. The model is gone afterwards."""
    model, tokenizer = load_model(source), load_tokenizer(source)
    if len(averaged) > 1:
        average_into(model, averaged, decay)
    write_hugging_face(part / _HF_DIR, model, tokenizer)
    return compute_reference_outputs(model, tokenizer)


def update_card(release_folder: str | Path) -> Path:
    """Write a release's card again with the scores of the evaluation.json beside it; return the card's path.

    Its row in the table of the run's other releases is entered too. release.json gets the hashes of what was written,
    and of no other file, so a damaged file is not made good. Raises InputError where the folder is no release or the
    scores are another checkpoint's.
    """
    folder = Path(release_folder)
    reject_symlink(folder.parent)
    scores, step = folder / "evaluation.json", read_facts(folder)["step"]
    if scores.is_file() and (found := read_json(scores)["step"]) != step:
        raise InputError(f"{scores}: of step {found}, this is step {step}; evaluate {folder}")
    if step is None:  # others' weights, of no run
        _write_card(folder, None)
    else:
        rewrite_cards(folder.resolve().parent)
    return folder / _CARD


def rewrite_cards(releases: Path) -> None:
    """Make releases.json and every release's card again from what lies in `RUN/releases`."""
    reject_symlink(releases)
    with blocking_lock(releases / "cards.lock"):  # an evaluation and a milestone's process may end together
        found = releases_table(releases)
        write_json(releases / "releases.json", found)
        for row in found["releases"]:
            _write_card(releases / row["folder"], found)


def find_checkpoint(source: Path, step: int | None) -> Path:
    """The checkpoint to release, whole to the last byte. Raises InputError, naming those that there are."""
    if (source / checkpoint.COMMIT).is_file():
        candidates = [source]
    elif (source / "recipe.yaml").is_file():
        candidates = checkpoint.list_committed(source)
    else:
        raise InputError(f"{source}: no run and no checkpoint here; give the folder of a run, such as runs/demo")
    if not candidates:
        raise InputError(f"{source}: the run has no whole checkpoint yet; train it further")
    steps = {checkpoint.step_of(folder): folder for folder in candidates}
    found = steps.get(max(steps) if step is None else step)
    if found is None:
        raise InputError(f"{source}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    if damage := checkpoint.find_damage(found):
        raise InputError(f"{damage[0]}; release another step or train this one again")
    return found


def _write_card(folder: Path, releases: dict[str, Any] | None) -> None:
    """A release's card, with the table of its run's releases, or that of others' weights; and release.json's hashes."""
    reject_symlink(folder)
    reject_symlinks(folder)
    facts, evaluation = read_json(folder / "release.json"), evaluation_of(folder)
    card = model_card(facts, evaluation, releases) if releases else foreign_card(facts, evaluation)
    with atomic_write(folder / _CARD) as file:
        file.write(card.encode())
    if releases and has_scores(releases):
        score_plot(releases, folder / _HF_DIR / "scores.png")
    written = [folder / name for name in (_CARD, f"{_HF_DIR}/scores.png", "evaluation.json")]
    facts["files"] |= {path.relative_to(folder).as_posix(): hash_file(path) for path in written if path.is_file()}
    write_json(folder / "release.json", facts)
