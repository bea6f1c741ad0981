"""Readers for torch's distributed checkpoints (DCP) that execute no code from the files.

DCP stores metadata and non-tensor values as pickles, and its own reader unpickles both without limits.
"""

import dataclasses
import io
import pickle
import re
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, ReadItem, filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import _get_layout

from tinyllama.errors import InputError
from tinyllama.files import read_regular_file

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
    **{
        (module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")
    },  # the folder in which the checkpoint was saved
}
"""Classes and functions in the metadata of tinyllama's checkpoints (torch 2.13); torch's dtypes are allowed too."""
_CLASSES_WITH_STATE = [value for value in _CLASSES.values() if dataclasses.is_dataclass(value)]
"""Classes whose instances may get attributes from a pickle."""
_FILE = re.compile(r"__\d+_\d+\.distcp")
"""Name of a DCP file with tensors."""


_PythonUnpickler: Any = pickle._Unpickler  # the implementation in C has no hook for BUILD


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    dispatch: ClassVar = dict(_PythonUnpickler.dispatch)

    def load_build(self) -> None:
        """Set attributes of an instance; refuse a class or function, which the entire process shares."""
        if type(self.stack[-2]) not in _CLASSES_WITH_STATE:
            raise pickle.UnpicklingError(f"sets attributes of {self.stack[-2]!r}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

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
        except (OSError, InputError):
            raise
        except Exception as error:  # a truncated or forged pickle may raise any exception
            raise InputError(f"{path}: not the metadata of a checkpoint ({error}); use another checkpoint") from None
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise InputError(f"{path}: not the metadata of a checkpoint; use another checkpoint")
        for info in found.storage_data.values():
            if not _FILE.fullmatch(str(getattr(info, "relative_path", ""))) or info.transform_descriptors:
                raise InputError(f"{path}: names a file that is not a checkpoint's; use another checkpoint")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, which unpickles non-tensor values with `weights_only=True`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a non-tensor value. Raises pickle.UnpicklingError if the value is not plain data."""
        plain = io.BytesIO()  # DCP unpickles without restrictions, so the safely loaded value is pickled again for DCP
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
