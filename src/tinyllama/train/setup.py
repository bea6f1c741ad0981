"""What a step needs, put together once: store, model, optimisers, ranks.

The model is built on the meta device, sharded, and only then given memory, so no rank ever holds more than its share
and one whole matrix. A weight's first value depends on the seed and its name alone, whatever the number of ranks.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tinyllama import hardware
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError, first_line, silence_torchao
from tinyllama.files import atomic_write, read_json, write_json
from tinyllama.formatting import echo
from tinyllama.loading import HuggingFaceLlama
from tinyllama.model.llama import PRECISIONS, Llama, initialize
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.distributed import World, build_mesh, shard_model
from tinyllama.train.guard import all_skipped_batches
from tinyllama.train.optimizer import build_optimizers
from tinyllama.train.validation import Validation, prepare_validation


@dataclass
class TrainState:
    """What a step needs. The weights are not there until `start` or a checkpoint has put them in place."""

    recipe: Recipe
    store: TokenStore
    tokenizer: Tokenizer
    ranks: World
    run: Path
    model: Llama
    optimizers: list[torch.optim.Optimizer]
    validation: Validation | None
    milestone_steps: set[int]
    went_back: list[dict[str, Any]] = field(default_factory=list)
    """See `guard.read_rollbacks`."""

    @property
    def skipped_batches(self) -> frozenset[int]:
        """Batches that the run does not learn from."""
        return all_skipped_batches(self.went_back)


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's run lies."""
    return Path("runs") / recipe.name


def build(recipe: Recipe, ranks: World) -> TrainState:
    """Open the store and build the model, its weights without values yet.

    Raises InputError where the store, the tokenizer, the ranks, the initial weights or a milestone's release do not fit
    the recipe.
    """
    store, tokenizer = TokenStore.open(recipe.data.store), Tokenizer.load(recipe.tokenizer)
    if store.manifest["tokenizer"]["digest"] != tokenizer.digest:
        raise InputError(
            f"{recipe.tokenizer}: not the tokenizer that {recipe.data.store} was made with; "
            "name that one in `tokenizer`, or another data.store and prepare that"
        )
    recipe.train.sequences_per_rank(ranks.count)  # refuses a batch that the ranks cannot share
    run = run_folder(recipe)
    vocab_size = _vocab_size(recipe, run, tokenizer)
    tokenizer = tokenizer.fitted(vocab_size)
    model = build_model(recipe, vocab_size, ranks)
    optimizers = build_optimizers(model, recipe.train.optimizer)
    validation = prepare_validation(recipe, store, tokenizer)
    if recipe.train.deterministic and ranks.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's documentation, "Results reproducibility"
        torch.use_deterministic_algorithms(True)
    return TrainState(recipe, store, tokenizer, ranks, run, model, optimizers, validation, recipe.milestone_steps())


def _vocab_size(recipe: Recipe, run: Path, tokenizer: Tokenizer) -> int:
    """Rows of the embedding: the tokenizer's pieces, or as many as the initial weights have."""
    origin = read_initial_weights_info(run)
    if origin and origin["source"] == recipe.train.initial_weights:
        return int(origin["vocab_size"])
    initial = open_initial_weights(recipe, tokenizer)
    return initial.vocab_size if initial else tokenizer.vocab_size


def build_model(recipe: Recipe, vocab_size: int, ranks: World) -> Llama:
    """The recipe's network, sharded and compiled as it says, in uninitialised memory on the ranks' device."""
    with torch.device("meta"):
        model = Llama(recipe.model, vocab_size, PRECISIONS[recipe.train.precision])
    if recipe.train.float8:
        _use_float8(model, ranks)
    model.set_activation_checkpointing(recipe.parallel.activation_checkpointing)
    if recipe.train.compile:
        _compile(model, ranks)
    if ranks.count > 1:
        shard_model(model, build_mesh(recipe.parallel, ranks))
    return model.to_empty(device=ranks.device)


def _compile(model: Llama, ranks: World) -> None:
    """Compile block by block: one graph serves all, and the embedding's backward, which would not repeat, stays out.

    What is compiled is the block's forward and not its call, so that FSDP's hooks around it stay outside.
    """
    if hardware.can_compile(ranks.device):
        for block in model.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
    elif ranks.is_main:
        echo(
            "no C++ compiler with Python's headers here: training continues uncompiled, which is slower", to_stderr=True
        )


def _use_float8(model: Llama, ranks: World) -> None:
    """Have torchao multiply the blocks' matrices in float8, scaled by row (torchao.float8's documentation)."""
    if ranks.device.type != "cuda" or torch.cuda.get_device_capability(ranks.device) < (8, 9):
        raise InputError(
            f"train.float8: {ranks.device} has no float8 products, GPUs from Ada and Hopper on do; take it out"
        )
    silence_torchao()
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # noqa: PLC0415
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "torchao"
        words = "is missing" if is_missing else f"does not work with torch {torch.__version__} ({first_line(error)})"
        remedy = "pip install -U 'tinyllama[float8]', or take float8 out"
        raise InputError(f"train.float8: torchao {words}; {remedy}") from None
    convert_to_float8_training(model.blocks, config=Float8LinearConfig.from_recipe_name("rowwise"))


def open_initial_weights(recipe: Recipe, tokenizer: Tokenizer) -> HuggingFaceLlama | None:
    """The model that the first step starts from, if any. Raises InputError where it is not the recipe's model."""
    if recipe.train.initial_weights is None:
        return None
    initial = HuggingFaceLlama.open(recipe.train.initial_weights)
    here = recipe.model.model_dump(exclude={"context_length"})  # positions are computed, so a context may be any
    for name, there in initial.config.model_dump(exclude={"context_length"}).items():
        if not math.isclose(there, here[name], rel_tol=1e-6):  # a constant may have been float32 on its way
            raise InputError(f"model.{name}: is {here[name]}, but {there} in {initial.folder}; make it the same")
    tokenizer.fitted(initial.vocab_size)  # refuses one that does not belong to it
    return initial


def initialize_weights(trainer: TrainState) -> None:
    """Give the weights their first values, and forget what the optimisers know."""
    initial = open_initial_weights(trainer.recipe, trainer.tokenizer)
    if initial:
        initial.load_into(trainer.model)
    else:
        initialize(trainer.model, trainer.recipe.seed)
    if trainer.ranks.is_main:
        _write_origin(trainer.run, trainer.recipe, initial)
    trainer.optimizers = build_optimizers(trainer.model, trainer.recipe.train.optimizer)


def write_run_folder(trainer: TrainState) -> None:
    """Put into the run what a release or a stranger needs to use it without the recipe's other folders."""
    with atomic_write(trainer.run / "recipe.yaml") as file:
        file.write(trainer.recipe.to_yaml().encode())
    with atomic_write(trainer.run / "store.json") as file:
        file.write((trainer.store.folder / "manifest.json").read_bytes())
    trainer.tokenizer.save(trainer.run / "tokenizer", trainer.recipe.model.context_length)


def read_initial_weights_info(run: Path) -> dict[str, Any] | None:
    """The weights of others that a run began from: `source`, `digest` and `vocab_size`; None where it drew its own.

    Kept in the run, so that it goes on where those weights are no more.
    """
    path = run / "initial_weights.json"
    return read_json(path) if path.is_file() else None


def _write_origin(run: Path, recipe: Recipe, initial: HuggingFaceLlama | None) -> None:
    path = run / "initial_weights.json"
    if initial is None:
        path.unlink(missing_ok=True)
        return
    source = recipe.train.initial_weights
    write_json(path, {"source": source, "digest": initial.digest, "vocab_size": initial.vocab_size})
