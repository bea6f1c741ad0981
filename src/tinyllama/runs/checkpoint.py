"""Checkpoints: a folder a step, whole or not there.

Writes `RUN/checkpoints/step-00000100/` with torch's distributed checkpoint (DCP), `state.json`, the run's recipe and
tokenizer, and last of all `commit.json` with the SHA-256 of every file. What lacks a commit, or does not match it, is
never resumed from. Training goes on while one is written, from a copy in memory; `Saver` writes one at a time.
"""

import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tinyllama.errors import InputError
from tinyllama.files import fsync_path, fsync_tree, is_inside, read_json, sha256_of, write_json
from tinyllama.runs.checkpoint_reader import SafePlanner, SafeReader

# DCP would say at each call, also from its threads, that there is one process: it was told so.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

COMMIT = "commit.json"
_READ = ("state.json", "recipe.yaml", ".metadata")
Optimizers = list[torch.optim.Optimizer]


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


_NAME = re.compile("step-([0-9]+)")


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name: they sort by it, not by their names."""
    if not (found := _NAME.fullmatch(folder.name)):
        raise InputError(f"{folder}: a checkpoint's folder is called step-NUMBER; give it its name back")
    return int(found[1])


def list_committed(run: Path) -> list[Path]:
    """Folders of all committed checkpoints, oldest first."""
    folders = (path.parent for path in (run / "checkpoints").glob(f"step-[0-9]*/{COMMIT}"))
    return sorted((folder for folder in folders if _NAME.fullmatch(folder.name)), key=step_of)


def find_damage(folder: Path) -> list[str]:
    """What does not match the commit, a line each; empty for a whole checkpoint."""
    found = []
    try:
        files = read_json(folder / COMMIT)["sha256"].items()
    except (InputError, KeyError, TypeError, AttributeError):
        return [f"{folder / COMMIT} is not a whole commit"]
    found += [
        f"{folder / COMMIT} does not name {name}"
        for name in _READ
        if (folder / name).exists() and name not in dict(files)
    ]
    for name, promised in files:
        path = folder / name
        if not is_inside(name):
            found.append(f"{folder / COMMIT} names {name!r}, a file outside its folder")
        elif not path.is_file():
            found.append(f"{path} is missing")
        elif sha256_of(path) != promised:
            found.append(f"{path} does not match its hash")
    return found


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, on all ranks together."""

    def __init__(
        self,
        run: Path,
        asynchronous: bool,
        on_commit: Callable[[int, float, float], None],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """On the first rank a thread calls `on_commit(step, seconds, seconds that training stood still)`.

        What `before_commit` raises is why a checkpoint fails.
        """
        self.run, self.asynchronous, self.on_commit, self.before_commit = run, asynchronous, on_commit, before_commit
        # A group of its own, so that writing beside training never mixes with training's collectives.
        self.group = None if _is_single_process() else dist.new_group(backend="gloo")
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.step = 0

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the checkpoint under way cannot be written."""
        return bool(self.pending and self.pending.done() and self.pending.exception())

    def begin(self, step: int, model: nn.Module, optimizers: Optimizers, state: dict[str, Any], begun: float) -> None:
        """Begin a checkpoint; the one before must be settled.

        `state` is JSON: what else the run must know to go on. `begun` is when training stopped for it, by perf_counter.
        """
        assert self.pending is None, "settle the checkpoint before this one first"
        self.step = step
        folder = checkpoint_folder(self.run, step)
        if _is_first_rank():
            shutil.rmtree(folder, ignore_errors=True)
        _barrier()
        weights, moments = _state_dicts(model, optimizers)
        content = {"model": weights, "optimizer": moments}
        written = self._write(content, folder)
        stood_still = time.perf_counter() - begun

        def finish() -> None:
            written.result()
            if _is_first_rank():
                write_json(folder / "state.json", {"step": step, **state})
                _copy_from_run(self.run, folder)
                self.before_commit()
                _commit(folder)
                self.on_commit(step, time.perf_counter() - begun, stood_still)

        self.pending = self.thread.submit(finish)

    def _write(self, content: dict[str, Any], folder: Path) -> "Future[Any]":
        where: dict[str, Any] = {"checkpoint_id": folder, "process_group": self.group, "no_dist": _is_single_process()}
        if not self.asynchronous:
            return _completed_future(lambda: dcp.save(content, **where))
        written = dcp.async_save(content, **where)
        assert isinstance(written, Future)  # with a stager of one's own it would be something else
        return written

    def close(self) -> None:
        """Wait for the thread that writes: what it does must be over before the run is another process's."""
        self.thread.shutdown(wait=True)

    def settle(self, alive: Callable[[], None] = lambda: None) -> str | None:
        """Wait for the checkpoint under way; return why, if it failed on any rank, and delete what is there of it.

        Calls `alive` every second: a disk may be slow.
        """
        if self.pending is None:
            return None
        while not wait([self.pending], timeout=1).done:
            alive()
        error, self.pending = self.pending.exception(), None
        reasons = [_root_cause(error) if error else None]
        if self.group is not None:
            gathered: list[list[str | None]] = [[]] * dist.get_world_size()
            dist.all_gather_object(gathered, reasons, group=self.group)
            reasons = [reason for theirs in gathered for reason in theirs]
        reason = next(filter(None, reasons), None)
        folder = checkpoint_folder(self.run, self.step)
        if reason and _is_first_rank() and not (folder / COMMIT).exists():
            shutil.rmtree(folder, ignore_errors=True)
        return reason


def _state_dicts(model: nn.Module, optimizers: Optimizers) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights' and the moments'. Saving changes nothing, also not an optimiser that has not stepped yet.

    Of such a one torch makes the state by a step of no length, and counts it.
    """
    untouched = [optimizer for optimizer in optimizers if not optimizer.state]
    weights, moments = get_state_dict(model, optimizers)
    for optimizer in untouched:
        for state in optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
    return weights, moments


def _root_cause(error: BaseException) -> str:
    """Why a checkpoint failed, in a line: what the system said, if it did, rather than what followed from that."""
    if said := _system_error(error):
        return str(said)
    # DCP's begin with the ranks and tracebacks that they came by.
    return (str(error).strip().splitlines() or [repr(error)])[-1].strip()


def _system_error(error: BaseException) -> OSError | None:
    """The system's own error behind another one, if any."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    for cause in causes:
        if isinstance(cause, OSError):
            return cause
        if before := cause.__cause__ or cause.__context__:
            causes.append(before)
    return None


def _unreadable(folder: Path, error: CheckpointException, recipes: str) -> InputError:
    """Return the error for a checkpoint that cannot be loaded; `recipes` is the remedy where its tensors differ."""
    if _system_error(error):
        return InputError(
            f"{folder}: cannot be read ({_root_cause(error)}); make its files readable and run this again"
        )
    if any(isinstance(cause, pickle.UnpicklingError) for cause, _ in error.failures.values()):
        return InputError(f"{folder}: a value in it is no plain data, so it is not loaded; use another checkpoint")
    return InputError(f"{folder}: does not fit its run's recipe.yaml ({_root_cause(error)}); {recipes}")


def _completed_future(call: Callable[[], object]) -> "Future[object]":
    """A future that has already happened, be it an error."""
    future: Future[object] = Future()
    try:
        future.set_result(call())
    except (Exception, CheckpointException) as error:  # DCP's is a BaseException
        future.set_exception(error)
    return future


def _copy_from_run(run: Path, folder: Path) -> None:
    """What the weights are of no use without: a checkpoint may be taken out of its run."""
    if (run / "recipe.yaml").is_file():
        shutil.copyfile(run / "recipe.yaml", folder / "recipe.yaml")
    if (run / "tokenizer").is_dir():
        shutil.copytree(run / "tokenizer", folder / "tokenizer")


def _commit(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    fsync_tree(folder)
    write_json(folder / COMMIT, {"sha256": {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}})
    fsync_path(folder.parent)


def load(folder: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Put a checkpoint's weights and optimiser state in place, on any number of ranks.

    Raises InputError where they cannot be read.
    """
    weights, moments = get_state_dict(model, optimizers)
    constants = [[_hyperparameters(group) for group in optimizer.param_groups] for optimizer in optimizers]
    try:
        _load({"model": weights, "optimizer": moments}, folder, _is_single_process())
    except CheckpointException as error:
        remedy = "put the run's recipe and initial_weights.json back, or give the run another name"
        raise _unreadable(folder, error, remedy) from error
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=moments)
    for optimizer, groups in zip(optimizers, constants, strict=True):
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group.update(own)  # the checkpoint's may be those of another recipe, see `--allow-change`


def _load(state: dict[str, Any], folder: Path, alone: bool) -> None:
    reader = SafeReader(folder)
    reader.read_metadata()  # DCP would log a traceback of its error
    dcp.load(state, storage_reader=reader, planner=SafePlanner(), no_dist=alone)


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors. Raises InputError where it is no such thing."""
    state = read_json(folder / "state.json")
    if not (isinstance(state, dict) and isinstance(state.get("vocab_size"), int | None)):
        raise InputError(f"{folder / 'state.json'}: not the state of a checkpoint; restore it, or delete {folder}")
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights alone in place, in one process.

    Raises InputError where a file is damaged and where the model has other tensors or sizes.
    """
    if damage := find_damage(folder):
        raise InputError(f"{damage[0]}; restore it, or use another checkpoint")
    weights = model.state_dict()
    try:
        _load({"model": weights}, folder, True)
    except CheckpointException as error:
        raise _unreadable(folder, error, "put that file back") from error
    model.load_state_dict(weights)


def is_marked_milestone(folder: Path) -> bool:
    """Whether a checkpoint is to be kept for ever; a damaged one is not to be known by."""
    try:
        return bool(read_state(folder).get("milestone"))
    except (InputError, OSError, AttributeError):
        return False


def prune(run: Path, keep: int, needed: Collection[Path] = ()) -> None:
    """Delete all committed checkpoints but the newest `keep`, the milestones and `needed`, and what is not whole."""
    whole = list_committed(run)
    kept = {*whole[-keep:], *needed, *filter(is_marked_milestone, whole)}
    for folder in (run / "checkpoints").glob("step-*"):
        if folder not in kept:
            delete(folder)


def delete(folder: Path) -> None:
    """Delete a checkpoint, its commit first, so that one half deleted is not taken for whole."""
    (folder / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _is_single_process() -> bool:
    return not dist.is_initialized()


def _is_first_rank() -> bool:
    return _is_single_process() or dist.get_rank() == 0


def _barrier() -> None:
    if not _is_single_process():
        dist.barrier()
