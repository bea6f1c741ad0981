"""A checkpoint as a folder that a stranger can use.

Reads a run, writes `RUN/releases/step-00000100/huggingface/` and `release.json` beside it. A release is made
under a hidden name and renamed when it is whole, so what has a release's name can be relied on.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError
from tinyllama.files import read_json, sync_directory, write_atomically, write_json
from tinyllama.model.loading import load_model, load_tokenizer
from tinyllama.release.card import model_card
from tinyllama.release.hf import write_hugging_face
from tinyllama.release.lineage import hash_file, hash_files, lineage, metrics_until
from tinyllama.release.plots import loss_plot
from tinyllama.train import checkpoint
from tinyllama.train.metrics import Journal

__all__ = ["release", "update_card"]

_CARD = "huggingface/README.md"


def release(run: str | Path, *, step: int | None = None, force: bool = False) -> Path:
    """Release a run's newest committed checkpoint, or that of `step`; return the release's folder.

    `run` may also be a checkpoint's folder. Raises InputError where there is no such checkpoint, where it
    does not match its hashes or its run, and where the release is there already, unless `force` replaces it.
    """
    source = find_checkpoint(Path(run), step)
    run = source.parent.parent
    folder = run / "releases" / source.name
    if folder.exists() and not force:
        raise InputError(f"{folder}: already released; --force replaces it")
    facts = lineage(source)
    with _whole_or_not_at_all(folder) as part:
        write_hugging_face(part / "huggingface", load_model(source), load_tokenizer(source))
        loss_plot(metrics_until(run, facts["step"]), part / "huggingface" / "loss.png")
        _write_card(part, facts, None)
        write_json(part / "release.json", {**facts, "files": hash_files(part)})
    Journal(run).event("release", facts["step"], folder=str(folder))
    return folder


def update_card(release_folder: str | Path) -> Path:
    """Write a release's card again with the scores of the evaluation.json beside it; return the card's path.

    release.json gets the hashes of these two files, and of no others, so a damaged file is not made good.
    Raises InputError where the folder is no release or the scores are another checkpoint's.
    """
    folder = Path(release_folder)
    if not (folder / "release.json").is_file():
        raise InputError(f"{folder}: no release here (no release.json); `tinyllama release` makes one of a run")
    facts = read_json(folder / "release.json")
    scores = folder / "evaluation.json"
    evaluation = read_json(scores) if scores.is_file() else None
    if evaluation and evaluation["step"] != facts["step"]:
        raise InputError(f"{scores}: of step {evaluation['step']}, this is step {facts['step']}; evaluate {folder}")
    _write_card(folder, facts, evaluation)
    changed = [path for path in (folder / _CARD, scores) if path.is_file()]
    facts["files"] |= {path.relative_to(folder).as_posix(): hash_file(path) for path in changed}
    write_json(folder / "release.json", facts)
    return folder / _CARD


def find_checkpoint(source: Path, step: int | None) -> Path:
    """The checkpoint to release, whole to the last byte. Raises InputError, naming those that there are."""
    if (source / checkpoint.COMMIT).is_file():
        candidates = [source]
    elif (source / "recipe.yaml").is_file():
        candidates = checkpoint.committed(source)
    else:
        raise InputError(f"{source}: no run and no checkpoint here; give the folder of a run, such as runs/demo")
    if not candidates:
        raise InputError(f"{source}: the run has no whole checkpoint yet; train it further")
    steps = {checkpoint.step_of(folder): folder for folder in candidates}
    found = steps.get(max(steps) if step is None else step)
    if found is None:
        raise InputError(f"{source}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    if damage := checkpoint.problems(found):
        raise InputError(f"{damage[0]}; release another step or train this one again")
    return found


def _write_card(folder: Path, facts: dict[str, Any], evaluation: dict[str, Any] | None) -> None:
    with write_atomically(folder / _CARD) as file:
        file.write(model_card(facts, evaluation).encode())


@contextmanager
def _whole_or_not_at_all(folder: Path) -> Iterator[Path]:
    """Yield a hidden sibling that takes the place of `folder` only when the block ends without an error."""
    part, replaced = (folder.with_name(f".{folder.name}.{word}") for word in ("part", "replaced"))
    for left_over in (part, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        _flush(part)
    except BaseException:
        shutil.rmtree(part)
        raise
    if folder.exists():
        folder.rename(replaced)
    part.rename(folder)
    sync_directory(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Make what lies in a folder outlast a power cut."""
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
