"""A model and its tokenizer from wherever they lie: a run, one of its checkpoints, a release, a Hugging Face folder.

Reads a folder's safetensors and nothing else of a stranger's. A run's own checkpoints are DCP's, whose metadata is a
pickle: their hashes are checked first, but whoever may write them may run code. Weights come in float32.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from tinyllama.errors import InputError
from tinyllama.files import read_json
from tinyllama.model.llama import Llama
from tinyllama.model.weights import from_hugging_face, shape_from_hugging_face
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.checkpoint import committed, load_weights


@dataclass(frozen=True)
class Located:
    """Where a model was found."""

    folder: Path
    """A checkpoint (holds commit.json) or a Hugging Face folder (holds config.json)."""
    run: Path | None
    """The run it belongs to; None for a Hugging Face folder."""

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer lies."""
        return self.folder if self.run is None else self.run / "tokenizer"


def locate(source: str | Path) -> Located:
    """Find a model: a run (its newest whole checkpoint), a checkpoint, a release, a Hugging Face folder or hub name.

    Raises InputError where there is none.
    """
    folder = Path(source)
    if (folder / "config.json").is_file():
        return Located(folder, None)
    if (folder / "huggingface" / "config.json").is_file():
        return Located(folder / "huggingface", None)
    if (folder / "commit.json").is_file():
        return Located(folder, folder.parent.parent)
    if (folder / "recipe.yaml").is_file():
        return Located(_newest(folder), folder)
    if folder.exists() or str(source).count("/") != 1:
        raise InputError(f"{source}: no model here; give a run, a checkpoint, a release or a Hugging Face folder")
    return Located(_download(str(source)), None)


def load_model(source: str | Path, precision: torch.dtype = torch.float32) -> Llama:
    """Load a model for scoring or generation: see `locate` for what `source` may be. Weights in float32."""
    found = locate(source)
    return _from_folder(found.folder, precision) if found.run is None else _from_checkpoint(found, precision)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load the tokenizer that belongs to a model."""
    return Tokenizer.load(locate(source).tokenizer_folder)


def _newest(run: Path) -> Path:
    folders = committed(run)
    if not folders:
        raise InputError(f"{run}: the run has no whole checkpoint yet; train it further")
    return folders[-1]


def _from_checkpoint(found: Located, precision: torch.dtype) -> Llama:
    assert found.run is not None
    recipe = Recipe.load(found.run / "recipe.yaml")
    model = Llama(recipe.model, Tokenizer.load(found.tokenizer_folder).vocab_size, precision)
    load_weights(found.folder, model)
    return model.eval()


def _from_folder(folder: Path, precision: torch.dtype) -> Llama:
    try:
        config = read_json(folder / "config.json")
        shape = shape_from_hugging_face(config)
        weights = from_hugging_face(_read_safetensors(folder), shape)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{folder}/config.json: not a Llama's configuration ({error!r}); only Llamas load") from None
    with torch.device("meta"):
        model = Llama(shape, config["vocab_size"], precision)
    try:
        model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{folder}: the weights do not fit config.json ({reason}); fetch or make both again") from None
    return model.eval()


def _read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    state: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise InputError(f"{name} is missing; only safetensors load, and all of them must be there")
        try:
            state.update(load_file(folder / name))
        except SafetensorError as error:
            raise InputError(f"{name} cannot be read ({error}); fetch or make it again") from None
    return state


def _download(name: str) -> Path:
    patterns = ["*.json", "*.safetensors", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: neither a folder here nor a model that the hub gives ({reason})") from None
