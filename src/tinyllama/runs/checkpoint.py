"""Checkpoints: one folder per saved step, with a commit file that marks it as complete.

The folder `RUN/checkpoints/step-00000100/` contains the tensors in the format of torch's distributed checkpoint (DCP),
`state.json`, and the run's recipe and tokenizer. `commit.json`, with the SHA-256 of every file, is written last. A run
never resumes from a checkpoint that has no commit or does not match its hashes. With asynchronous saving, training
continues while a copy of the tensors is written from memory. `CheckpointWriter` writes one checkpoint at a time.
"""

import dataclasses
import io
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, ReadItem, filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.serialization import _get_layout

from tinyllama import torch_versions
from tinyllama.errors import CommandAbort, InputError
from tinyllama.files import fsync_path, fsync_tree, read_regular_file, sha256_of, write_json
from tinyllama.runs.run_dir import CheckpointDir, RunDir

# DCP warns at each call in a single process, but training in a single process is intended.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
warnings.filterwarnings("ignore", message=torch_versions.CHECKPOINT_WARNING)

Optimizers = list[torch.optim.Optimizer]


class CheckpointWriter:
    """Writer of a run's checkpoints. All ranks write together, one checkpoint at a time."""

    def __init__(
        self,
        run: RunDir,
        asynchronous: bool,
        on_commit: Callable[[int, float, float], None],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Create this rank's writer; all ranks must create one, because the writers share a process group.

        Before a commit, a thread on rank 0 calls `before_commit`. If this call raises an exception, the checkpoint is
        not committed. After a commit, the thread calls `on_commit(step, seconds, stall_seconds)`. `seconds` is the
        duration of the save, and `stall_seconds` is the part of this duration in which training waited.
        """
        self.run, self.asynchronous, self.on_commit, self.before_commit = run, asynchronous, on_commit, before_commit
        # With a separate process group, the writers' collectives never mix with those of training.
        self.group = None if _is_single_process() else dist.new_group(backend="gloo")
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.step = 0

    @property
    def has_failed(self) -> bool:
        """Whether writing the pending checkpoint has failed on this rank."""
        return bool(self.pending and self.pending.done() and self.pending.exception())

    def start_save(
        self, step: int, model: nn.Module, optimizers: Optimizers, state: dict[str, Any], start: float
    ) -> None:
        """Start writing a checkpoint; the caller must `wait` for the previous checkpoint first.

        `state` holds the JSON values that a resumed run needs in addition to the tensors. `start` is the value of
        `time.perf_counter()` when training began to wait.
        """
        assert self.pending is None, "wait for the previous checkpoint first"
        self.step = step
        checkpoint = self.run.checkpoint(step)
        if _is_main_rank():
            shutil.rmtree(checkpoint.path, ignore_errors=True)
        if not _is_single_process():
            dist.barrier()
        weights, moments = _state_dicts(model, optimizers)
        written = self._write({"model": weights, "optimizer": moments}, checkpoint)
        stall_seconds = time.perf_counter() - start

        def finish() -> None:
            written.result()
            if _is_main_rank():
                write_json(checkpoint.state_path, {"step": step, **state})
                _copy_recipe_and_tokenizer(self.run, checkpoint)
                self.before_commit()
                _commit(checkpoint)
                self.on_commit(step, time.perf_counter() - start, stall_seconds)

        self.pending = self.thread.submit(finish)

    def _write(self, content: dict[str, Any], checkpoint: CheckpointDir) -> "Future[Any]":
        options: dict[str, Any] = {"process_group": self.group, "no_dist": _is_single_process()}
        if self.asynchronous:
            written = dcp.async_save(content, checkpoint_id=checkpoint.path, **options)
            assert isinstance(written, Future)  # the type differs only with a custom stager
            return written
        done: Future[Any] = Future()
        try:
            done.set_result(dcp.save(content, checkpoint_id=checkpoint.path, **options))
        except (Exception, CheckpointException) as error:  # DCP's exception is a BaseException
            done.set_exception(error)
        return done

    def wait(self, alive: Callable[[], None] = lambda: None) -> str | None:
        """Wait for the pending checkpoint; if it failed on any rank, delete its files and return the reason.

        Calls `alive` every second, so that the watchdog does not mistake a slow disk for a hang.
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
            reasons = [reason for rank_reasons in gathered for reason in rank_reasons]
        reason = next(filter(None, reasons), None)
        checkpoint = self.run.checkpoint(self.step)
        if reason and _is_main_rank() and not checkpoint.is_committed:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
        return reason

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Wait until the writing thread has ended; only then may another process train the run.

        After Ctrl-C in a command, do not wait: the process ends, and no run resumes from an incomplete checkpoint.
        """
        self.thread.shutdown(wait=not isinstance(error, CommandAbort))


def _state_dicts(model: nn.Module, optimizers: Optimizers) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state dicts of the model and the optimizers, without changing any value in them.

    If an optimizer has never stepped, torch creates the optimizer's state with a step at a learning rate of 0. torch
    counts that step, so this function resets the counter.
    """
    unused = [optimizer for optimizer in optimizers if not optimizer.state]
    weights, moments = get_state_dict(model, optimizers)
    for optimizer in unused:
        for state in optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
    return weights, moments


def _copy_recipe_and_tokenizer(run: RunDir, checkpoint: CheckpointDir) -> None:
    """Copy the recipe and the tokenizer into a checkpoint, so that the checkpoint can be used without the run."""
    if run.recipe_path.is_file():
        shutil.copyfile(run.recipe_path, checkpoint.recipe_path)
    if run.tokenizer_dir.is_dir():
        shutil.copytree(run.tokenizer_dir, checkpoint.tokenizer_dir)


def _commit(checkpoint: CheckpointDir) -> None:
    folder = checkpoint.path
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    fsync_tree(folder)
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    write_json(checkpoint.commit_path, {"sha256": hashes})
    fsync_path(folder.parent)


def load_checkpoint(checkpoint: CheckpointDir, model: nn.Module, optimizers: Optimizers) -> None:
    """Load a checkpoint's weights and optimizer state, on any number of ranks.

    The optimizers keep their hyperparameters, which may differ from those of the checkpoint (see `--allow-change`).
    Raises InputError if the files cannot be read, or if their tensors differ in name or shape from those of the model.
    """
    weights, moments = get_state_dict(model, optimizers)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    hyperparameters = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    remedy = "restore the run's recipe and initial_weights.json, or give the run another name"
    _load({"model": weights, "optimizer": moments}, checkpoint, _is_single_process(), remedy)
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=moments)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, own in zip(groups, hyperparameters, strict=True):
        group.update(own)


def load_weights(checkpoint: CheckpointDir, model: nn.Module) -> None:
    """Load a checkpoint's weights without optimizer state, in one process.

    Raises InputError if a file is damaged, or if its tensors differ in name or shape from those of the model.
    """
    if damage := checkpoint.find_damage():
        raise InputError(f"{damage[0]}; restore it, or use another checkpoint")
    weights = model.state_dict()
    _load({"model": weights}, checkpoint, True, "restore that file")
    model.load_state_dict(weights)


def _load(state: dict[str, Any], checkpoint: CheckpointDir, is_single_process: bool, remedy: str) -> None:
    """Load tensors into `state`; `remedy` ends the error message for tensors that do not match the recipe."""
    reader = SafeReader(checkpoint.path)
    try:
        reader.read_metadata()  # inside `dcp.load`, an error here would be logged with a traceback
        dcp.load(state, storage_reader=reader, planner=SafePlanner(), no_dist=is_single_process)
    except CheckpointException as error:
        if _system_error(error):
            problem = f"cannot be read ({_root_cause(error)}); make its files readable and run the command again"
        elif any(isinstance(cause, pickle.UnpicklingError) for cause, _ in error.failures.values()):
            problem = "contains a value that is not plain data and may execute code; use another checkpoint"
        else:
            problem = f"does not fit its run's recipe.yaml ({_root_cause(error)}); {remedy}"
        raise InputError(f"{checkpoint.path}: {problem}") from error


def _root_cause(error: BaseException) -> str:
    """Return the reason for a failure in one line: the operating system's error, or else the message's last line."""
    if system_error := _system_error(error):
        return str(system_error)
    # DCP's messages begin with ranks and tracebacks, so the reason is on the last line.
    return (str(error).strip().splitlines() or [repr(error)])[-1].strip()


def _system_error(error: BaseException) -> OSError | None:
    """Return the operating system's error that caused another error, or None."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    for cause in causes:
        if isinstance(cause, OSError):
            return cause
        if previous := cause.__cause__ or cause.__context__:
            causes.append(previous)
    return None


def _is_single_process() -> bool:
    return not dist.is_initialized()


def _is_main_rank() -> bool:
    return _is_single_process() or dist.get_rank() == 0


def _no_path(*parts: Any) -> None:
    """Replace the folder in which a checkpoint was saved; the reader overwrites this folder."""


# DCP stores metadata and non-tensor values as pickles, and its own reader unpickles both without restrictions. The
# classes below read them without executing code from the files.
_CLASSES = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,  # finds layouts by name, such as "torch.strided"
    ("pathlib", "PosixPath"): _no_path,
    ("pathlib._local", "PosixPath"): _no_path,
}
"""Classes and functions that a checkpoint's metadata may name (torch 2.9 to 2.15); torch's dtypes are also allowed."""
_CLASSES_WITH_STATE = [cls for cls in _CLASSES.values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)]
"""Classes on whose instances a pickle may set attributes."""
_FILE = re.compile(r"__\d+_\d+\.distcp")
"""Name of a tensor file that DCP writes."""


_MAX_DIMENSIONS = 64  # of torch's tensors
_PythonUnpickler: Any = pickle._Unpickler  # the implementation in C has no hooks for opcodes


def _then_refuse(opcode: bytes, is_refused: Callable[[Any], bool]) -> Callable[[Any], None]:
    """Return a handler that executes an opcode, then rejects the top of the stack if `is_refused` returns true."""
    load = _PythonUnpickler.dispatch[opcode[0]]

    def load_and_check(unpickler: Any) -> None:
        load(unpickler)
        if is_refused(unpickler.stack[-1]):
            raise pickle.UnpicklingError("contains nested or repeated containers")

    return load_and_check


def _is_container(value: Any) -> bool:
    """Return whether many references to a value could make hashing, comparing or printing take exponential time."""
    is_shape = isinstance(value, torch.Size) and len(value) <= _MAX_DIMENSIONS
    return isinstance(value, (tuple, list, dict, *_CLASSES_WITH_STATE)) and not is_shape


def _is_nested(value: Any) -> bool:
    """Return whether a tuple contains tuples of tuples; hashing a deeply nested tuple can overflow the stack."""
    return any(isinstance(inner, tuple) for part in value if isinstance(part, tuple) for inner in part)


class _Dict(dict[Any, Any]):
    """A dict without keys that a stranger can choose so that their hashes are equal."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, (str, metadata.MetadataIndex)):
            raise pickle.UnpicklingError("contains a key that is neither a name nor an index")
        super().__setitem__(key, value)


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    dispatch: ClassVar = dict(_PythonUnpickler.dispatch) | {
        opcode[0]: _then_refuse(opcode, is_refused)
        for opcodes, is_refused in (
            ((pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.DUP), _is_container),
            ((pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), _is_nested),
        )
        for opcode in opcodes
    }

    def load_build(self) -> None:
        """Set attributes of an instance; refuse classes and functions, whose attributes the entire process shares."""
        if type(self.stack[-2]) not in _CLASSES_WITH_STATE:
            raise pickle.UnpicklingError(f"sets attributes of a {type(self.stack[-2]).__name__}")
        if isinstance(self.stack[-2], metadata.TensorProperties):
            self.stack[-1] = torch_versions.known_properties(self.stack[-1], metadata.TensorProperties)
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def load_empty_dict(self) -> None:
        self.append(_Dict())

    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dict
    del dispatch[pickle.DICT[0]], dispatch[pickle.ADDITEMS[0]], dispatch[pickle.FROZENSET[0]]  # DCP writes none

    def find_class(self, module: str, name: str) -> Any:
        found = _CLASSES.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint")
        return found


class SafeReader(FileSystemReader):
    """DCP's reader of a folder, restricted to the allowed classes and to files in the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the folder's metadata. Raises InputError if the metadata names a class or file that is not allowed."""
        path = Path(self.path) / ".metadata"
        try:
            found = _Unpickler(io.BytesIO(read_regular_file(path))).load()
            tensors = [
                value for value in found.state_dict_metadata.values() if isinstance(value, TensorStorageMetadata)
            ]
            has_shapes = all(isinstance(tensor.size, torch.Size) for tensor in tensors)
        except (OSError, InputError):
            raise
        except Exception as error:  # a truncated or forged pickle may raise any exception
            raise InputError(f"{path}: not the metadata of a checkpoint ({error}); use another checkpoint") from None
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict) or not has_shapes:
            raise InputError(f"{path}: not the metadata of a checkpoint; use another checkpoint")
        for info in found.storage_data.values():
            name = getattr(info, "relative_path", None)
            if not isinstance(name, str) or not _FILE.fullmatch(name) or info.transform_descriptors:
                raise InputError(f"{path}: names a file that is not a checkpoint's tensor file; use another checkpoint")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class SafePlanner(DefaultLoadPlanner):
    """DCP's load planner, changed to unpickle non-tensor values with `weights_only=True`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a non-tensor value. Raises pickle.UnpicklingError if the value is not plain data."""
        plain = io.BytesIO()  # DCP unpickles without restrictions, so the safely loaded value is pickled again for DCP
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
