"""A model and its tokenizer from wherever they lie: a run, one of its checkpoints, a release, a Hugging Face folder.

Reads the safetensors of a folder, never its pickles. A run's checkpoints are in torch's distributed format (DCP): their
hashes are checked first, and `train.checkpoint_reader` executes no code from them. Weights are loaded in float32.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from tinyllama.errors import InputError, first_line, translate_damage_errors, warn_once
from tinyllama.files import is_file_name, read_json, replacement_remedy, sha256_of
from tinyllama.model.flops import num_parameters
from tinyllama.model.llama import Llama
from tinyllama.model.weights import config_from_hugging_face, from_hugging_face, load_parameters
from tinyllama.recipe import Model, Recipe
from tinyllama.runs.checkpoint import list_committed, load_weights, read_state
from tinyllama.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelLocation:
    """Where a model was found."""

    folder: Path
    """A checkpoint (holds commit.json) or a Hugging Face folder (holds config.json)."""
    is_checkpoint: bool

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer lies."""
        return self.folder / "tokenizer" if self.is_checkpoint else self.folder


def resolve_model(source: str | Path) -> ModelLocation:
    """Find a model: a run (its newest whole checkpoint), a checkpoint, a release, a Hugging Face folder or hub name.

    Raises InputError where there is none.
    """
    folder = Path(source)
    if (folder / "config.json").is_file():
        return ModelLocation(folder, is_checkpoint=False)
    if (folder / "huggingface" / "config.json").is_file():
        return ModelLocation(folder / "huggingface", is_checkpoint=False)
    if (folder / "commit.json").is_file() and not (folder / "release.json").is_file():
        return ModelLocation(folder, is_checkpoint=True)
    if (folder / "recipe.yaml").is_file():
        return ModelLocation(_newest(folder), is_checkpoint=True)
    if folder.exists() or str(source).count("/") != 1:
        raise InputError(f"{source}: no model here; give a run, a checkpoint, a release or a Hugging Face folder")
    return ModelLocation(_download(str(source)), is_checkpoint=False)


def load_model(source: str | Path, precision: torch.dtype = torch.float32) -> Llama:
    """Load a model for scoring or generation: see `resolve_model` for what `source` may be. Weights in float32."""
    found = resolve_model(source)
    return _from_checkpoint(found, precision) if found.is_checkpoint else _from_folder(found.folder, precision)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load the tokenizer that belongs to a model, as it fits its weights: see `Tokenizer.fitted`."""
    found = resolve_model(source)
    tokenizer = Tokenizer.load(found.tokenizer_folder)
    rows = None if found.is_checkpoint else read_json(found.folder / "config.json").get("vocab_size")
    return tokenizer.fitted(rows) if isinstance(rows, int) else tokenizer


def _newest(run: Path) -> Path:
    folders = list_committed(run)
    if not folders:
        raise InputError(f"{run}: the run has no whole checkpoint yet; train it further")
    return folders[-1]


def _from_checkpoint(found: ModelLocation, precision: torch.dtype) -> Llama:
    recipe = Recipe.load(found.folder / "recipe.yaml")
    with translate_damage_errors(found.folder):
        state = read_state(found.folder)
        vocab_size = int(state.get("vocab_size") or Tokenizer.load(found.tokenizer_folder).vocab_size)
    held = sum(path.stat().st_size for path in found.folder.glob("*.distcp"))
    if (wanted := num_parameters(recipe.model, vocab_size)) > held:
        sizes = f"{wanted:,} parameters, but its files have {held:,} bytes"
        raise InputError(f"{found.folder}: the weights do not fit its recipe.yaml and state.json ({sizes})")
    model = Llama(recipe.model, vocab_size, precision)
    load_weights(found.folder, model)
    return model.eval()


def _from_folder(folder: Path, precision: torch.dtype) -> Llama:
    there = HuggingFaceLlama.open(folder)
    there.check_parameter_count()
    with torch.device("meta"):
        model = Llama(there.shape, there.vocab_size, precision)
    there.fill(model.to_empty(device="cpu"))
    return model.eval()


@dataclass(frozen=True)
class HuggingFaceLlama:
    """A Hugging Face Llama's folder, whose weights are read one at a time."""

    folder: Path
    shape: Model
    vocab_size: int

    @classmethod
    def open(cls, source: str | Path) -> "HuggingFaceLlama":
        """Read a folder's, a release's or a hub model's config.json. Raises InputError where it is no Llama's."""
        folder = resolve_model(source).folder
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no config.json; give a Hugging Face Llama's folder")
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise InputError(
                f"{folder}/config.json: a {type(config).__name__}, not an object; give a Llama's config.json"
            )
        try:
            there = cls(folder, config_from_hugging_face(config), int(config["vocab_size"]))
            return there._untied() if there.shape.tie_embeddings and there._has_another_head() else there
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None

    def _has_another_head(self) -> bool:
        """Whether the files hold a head that is not the embedding, although config.json ties the two."""
        try:
            stored = Safetensors(self.files())
        except InputError:  # raised again where the weights are read
            return False
        head, embedding = (stored.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        return head is not None and embedding is not None and not torch.equal(head.float(), embedding.float())

    def _untied(self) -> "HuggingFaceLlama":
        warn_once(
            f"{self.folder}: config.json ties the embeddings, but lm_head.weight is another tensor than the embedding; "
            "loaded as untied, as transformers 5 does"
        )
        return replace(self, shape=self.shape.model_copy(update={"tie_embeddings": False}))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Our names and the tensors, as stored. Raises InputError where files or tensors are missing or foreign."""
        yield from from_hugging_face(Safetensors(self.files()), self.shape)

    def fill(self, model: Llama) -> None:
        """Put its weights into a model of its shape. Raises InputError as `weights` does, and where sizes differ."""
        try:
            load_parameters(model, self.weights())
        except (InputError, SafetensorError) as error:
            raise InputError(f"{self.folder}: {error}") from None

    def check_parameter_count(self) -> None:
        """Raise InputError where config.json speaks of more parameters than the files have bytes; no memory may."""
        try:
            held = sum(path.stat().st_size for path in self.files())
            Safetensors(self.files())  # says it where one of them is broken
        except InputError as error:
            raise InputError(f"{self.folder}: {error}") from None
        wanted = num_parameters(self.shape, self.vocab_size)
        if wanted > held:
            sizes = f"{wanted:,} parameters, but the weights' files have {held:,} bytes"
            raise InputError(f"{self.folder}: the weights do not fit config.json ({sizes}); fetch or make both again")

    def files(self) -> list[Path]:
        """The files of its weights: those that transformers would read. Raises InputError where one is missing."""
        whole, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        names = indexed_files(index) if index.is_file() and not whole.is_file() else {whole.name}
        for name in sorted(names):
            if not (self.folder / name).is_file():
                raise InputError(f"{name} is missing; {_advice(self.folder)}")
        return [self.folder / name for name in sorted(names)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names and hashes of its weights' files."""
        lines = (f"{sha256_of(path)}  {path.name}\n" for path in self.files())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def indexed_files(index: Path) -> set[str]:
    """Return the files that an index of weights names. Raises InputError for one outside its folder."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index.name} has no weight_map of files; fetch it again, or save the model again")
    if outside := [name for name in places.values() if not is_file_name(name)]:
        raise InputError(f"{index.name} names a file outside its folder, {outside[0]!r}; save the model again")
    return set(places.values())


def _advice(folder: Path) -> str:
    """What to do where weights are missing."""
    pickles = sorted(path.name for ending in ("bin", "pth", "pt") for path in folder.glob(f"*.{ending}"))
    if not pickles:
        return "only safetensors load, and all of them must be there: fetch or save the others too"
    return f"{pickles[0]} is a pickle, which may run code as it loads: write it anew by transformers' save_pretrained"


class Safetensors(Mapping[str, torch.Tensor]):
    """The tensors of some safetensors files, each read when it is asked for; InputError names a file that is broken."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in paths:
            with path.open("rb") as file:  # raises the system's own error; safetensors reports "no such file" for any
                first = file.read(100)
            try:
                tensors = safe_open(path, "pt")
            except SafetensorError as error:
                raise InputError(f"{path.name} cannot be read ({error}); {replacement_remedy(first)}") from None
            self._files |= dict.fromkeys(tensors.keys(), tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _download(name: str) -> Path:
    patterns = ["*.json", "*.safetensors", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.filename:  # a file or a disk here, not the hub
            raise
        reason = first_line(error).rstrip(".")
        raise InputError(
            f"{name}: neither a folder here nor a model that the hub gives ({reason}); correct the name, connect to "
            "the hub, or set HF_TOKEN to a token that may read it"
        ) from None
