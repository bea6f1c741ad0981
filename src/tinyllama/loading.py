"""Loading of models and tokenizers from a run, a checkpoint, a release, a Hugging Face folder or the hub.

This module reads a folder's safetensors files, but never its pickle files. Checkpoints are in torch's distributed
format (DCP). A checkpoint's hashes are checked before it is loaded, and `runs.checkpoint` executes no code from
a checkpoint. Weights are loaded in float32.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tinyllama.errors import InputError, translate_damage_errors, warn_once
from tinyllama.files import (
    Row,
    is_file_name,
    read_json,
    read_json_if_exists,
    reject_large_file,
    replacement_remedy,
    sha256_of,
)
from tinyllama.model.flops import num_parameters
from tinyllama.model.llama import Llama
from tinyllama.model.weights import config_from_hugging_face, from_hugging_face, load_parameters
from tinyllama.recipe import Model, Recipe
from tinyllama.recipe.loading import abbreviated_repr
from tinyllama.runs.checkpoint import load_weights
from tinyllama.runs.run_dir import CheckpointDir, ReleaseDir, RunDir, similar_run
from tinyllama.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelLocation:
    """The folder of a model: a checkpoint (with commit.json) or a Hugging Face folder (with config.json)."""

    folder: Path
    is_checkpoint: bool

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the model's tokenizer."""
        return CheckpointDir(self.folder).tokenizer_dir if self.is_checkpoint else self.folder


def model_path(source: object) -> str:
    """Return a path or a hub name as a string. Raises InputError if `source` is neither, nor a `Run`."""
    if not isinstance(source, str | os.PathLike):
        expected = "a Run, the path of a model or a hub name"
        raise InputError(f"model: {abbreviated_repr(source)} is not a model; give {expected}")
    return os.fspath(source)


def resolve_model(source: str | os.PathLike[str]) -> ModelLocation:
    """Find a model: a run (its newest checkpoint), a checkpoint, a release, a Hugging Face folder or a hub name.

    Raises InputError if `source` is none of these.
    """
    source = model_path(source)
    folder = Path(source)
    for candidate in (folder, folder / "huggingface"):
        if (candidate / "config.json").is_file():
            return ModelLocation(candidate, is_checkpoint=False)
    if CheckpointDir(folder).is_committed and not ReleaseDir(folder).exists:
        return ModelLocation(folder, is_checkpoint=True)
    if RunDir(folder).recipe_path.is_file():
        return ModelLocation(RunDir(folder).find_checkpoint().path, is_checkpoint=True)
    if folder.exists() or source.count("/") != 1 or folder.parent == Path("runs"):
        remedy = "give a run, a checkpoint, a release or a Hugging Face folder; `tinyllama train RECIPE` makes a run"
        raise InputError(f"{source}: no model found; {similar_run(source) or remedy}")
    from tinyllama.hub import download_snapshot  # noqa: PLC0415 - a machine that only trains may lack its requirements

    return ModelLocation(download_snapshot(source, ["*.json", "*.safetensors", "tokenizer.model"]), is_checkpoint=False)


def load_model(source: str | os.PathLike[str], precision: torch.dtype = torch.float32) -> Llama:
    """Load a model in evaluation mode, with activations of the dtype `precision`.

    `source` is a run (its newest checkpoint), a checkpoint, a release, a Hugging Face folder or a hub name. Raises
    InputError if `source` has no model, if the model's files are damaged, or if the model is not a supported Llama.
    """
    location = resolve_model(source)
    if location.is_checkpoint:
        return _load_checkpoint(location, precision).eval()
    found = HuggingFaceLlama.open(location.folder)
    found.check_size()
    with torch.device("meta"):
        model = Llama(found.config, found.vocab_size, precision)
    found.load_into(model.to_empty(device="cpu"))
    return model.eval()


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Load a model's tokenizer, without tokens that have no row in the model's embedding.

    Raises InputError if `source` has no model or no tokenizer, or if a token of plain text has no row.
    """
    location = resolve_model(source)
    tokenizer = Tokenizer.load(location.tokenizer_folder)
    rows = None if location.is_checkpoint else read_json(location.folder / "config.json").get("vocab_size")
    return tokenizer.fitted(rows) if isinstance(rows, int) else tokenizer


def _load_checkpoint(location: ModelLocation, precision: torch.dtype) -> Llama:
    folder, checkpoint = location.folder, CheckpointDir(location.folder)
    recipe = Recipe.load(checkpoint.recipe_path)
    with translate_damage_errors(folder):
        vocab_size = int(checkpoint.state().get("vocab_size") or Tokenizer.load(location.tokenizer_folder).vocab_size)
    _check_size(folder, "recipe.yaml and state.json", recipe.model, vocab_size, checkpoint.tensor_paths)
    model = Llama(recipe.model, vocab_size, precision)
    load_weights(checkpoint, model)
    return model


def _check_size(folder: Path, described_in: str, config: Model, vocab_size: int, files: Iterable[Path]) -> None:
    """Check, before allocating memory, that a model's files have at least one byte per parameter."""
    wanted, num_bytes = num_parameters(config, vocab_size), sum(path.stat().st_size for path in files)
    if wanted > num_bytes:
        sizes = f"{wanted:,} parameters, but the files have {num_bytes:,} bytes"
        raise InputError(f"{folder}: the weights do not fit {described_in} ({sizes}); restore or download the folder")


@dataclass(frozen=True)
class HuggingFaceLlama:
    """A Hugging Face folder of a Llama model; its weights are read one tensor at a time."""

    folder: Path
    config: Model
    vocab_size: int

    @classmethod
    def open(cls, source: str | Path) -> "HuggingFaceLlama":
        """Read the config.json of a folder, a release or a hub model.

        Raises InputError if the model is not a supported Llama, and its subclass UnsupportedModelError if transformers
        may run the model.
        """
        folder = resolve_model(source).folder
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no config.json; give a Hugging Face Llama's folder")
        content = read_json(folder / "config.json")
        try:
            found = cls(folder, *config_from_hugging_face(content))
        except InputError as error:
            raise type(error)(f"{folder}: {error}") from None
        if not (found.config.tie_embeddings and found._has_own_head()):
            return found
        warn_once(
            f"{folder}: config.json ties the embeddings, but lm_head.weight differs from the embedding; "
            "loaded as untied, as transformers 5 does"
        )
        return replace(found, config=found.config.model_copy(update={"tie_embeddings": False}))

    def _has_own_head(self) -> bool:
        """Return whether the files contain an output head that differs from the embedding."""
        try:
            stored = Safetensors(self.files())
        except InputError:  # raised again when the weights are read
            return False
        head, embedding = (stored.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        return head is not None and embedding is not None and not torch.equal(head.float(), embedding.float())

    def load_into(self, model: Llama) -> None:
        """Copy the weights into a model; a sharded parameter receives only this rank's part.

        Raises InputError if a tensor is missing, unknown or damaged, or if its shape is wrong.
        """
        stored = Safetensors(self.files())
        try:
            load_parameters(model, from_hugging_face(stored, self.config))
        except (InputError, SafetensorError) as error:
            raise InputError(f"{self.folder}: {error}") from None

    def check_size(self) -> None:
        """Check that the weight files are readable and large enough for config.json. Raises InputError otherwise."""
        Safetensors(self.files())
        _check_size(self.folder, "config.json", self.config, self.vocab_size, self.files())

    def files(self) -> list[Path]:
        """Return the safetensors files that transformers would read. Raises InputError if a file is missing."""
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        names = indexed_files(index) if index.is_file() and not single.is_file() else {single.name}
        for name in sorted(names):
            if not (self.folder / name).is_file():
                raise InputError(f"{self.folder / name}: is missing; {_missing_weights_remedy(self.folder)}")
        return [self.folder / name for name in sorted(names)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names and hashes of the weight files."""
        lines = (f"{sha256_of(path)}  {path.name}\n" for path in self.files())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_model_folder(folder: Path) -> None:
    """Check that transformers would load only files inside the folder, and no large files other than weights.

    Raises InputError otherwise.
    """
    for path in folder.iterdir():
        if path.suffix in (".json", ".model", ".txt", ".jinja"):
            reject_large_file(path, path.stat().st_size)
        if path.name.endswith(".index.json"):
            indexed_files(path)
    config = read_json_if_exists(folder / "config.json")
    weights = config.get("transformers_weights") if isinstance(config, dict) else None
    if not is_file_name(str(weights)):
        raise InputError(f"{folder}: config.json names weights outside the folder, {weights!r}; save the model again")
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        fields = read_json_if_exists(path)
        if isinstance(fields, dict) and not _names_no_path(fields):
            raise InputError(f"{path}: names a file outside its folder; save the tokenizer again")
    if (folder / "adapter_config.json").exists():  # this file names the model's folder
        raise InputError(f"{folder}: adapter_config.json belongs to an adapter; merge the adapter into its base model")


def _names_no_path(tokenizer_fields: Row) -> bool:
    """Return whether a tokenizer's fields name no path that transformers would open, inside or outside the folder."""
    names = tokenizer_fields.get("fast_tokenizer_files", [])
    is_safe = isinstance(names, list) and all(is_file_name(str(name)) for name in names)
    return is_safe and not any(isinstance(tokenizer_fields.get(name), str) for name in ("vocab", "merges"))


def indexed_files(index: Path) -> set[str]:
    """Return the file names in an index of safetensors files. Raises InputError if a name leads out of the folder."""
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: has no weight_map of files; download it again, or save the model again")
    if outside := [name for name in names.values() if not is_file_name(name)]:
        raise InputError(f"{index}: names a file outside its folder, {outside[0]!r}; save the model again")
    return set(names.values())


def _missing_weights_remedy(folder: Path) -> str:
    pickles = sorted(path.name for ending in ("bin", "pth", "pt") for path in folder.glob(f"*.{ending}"))
    if not pickles:
        return "only safetensors files are read: download all of them, or save the model with save_pretrained"
    return f"{pickles[0]} is a pickle, which can run code when loaded: convert it with transformers' save_pretrained"


class Safetensors(Mapping[str, torch.Tensor]):
    """Mapping from names to the tensors of several safetensors files; each access reads the tensor from its file.

    Raises InputError for a damaged file.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in paths:
            with path.open("rb") as file:  # raises the system's error; safetensors always reports "no such file"
                first = file.read(100)
            try:
                tensors = safe_open(path, "pt")
            except SafetensorError as error:
                raise InputError(f"{path}: cannot be read ({error}); {replacement_remedy(first)}") from None
            self._files |= dict.fromkeys(tensors.keys(), tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
