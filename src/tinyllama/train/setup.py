"""The state of a training run on one rank (store, tokenizer, model and optimizers), and the optimizer step.

The model is built on the meta device, sharded, and only then allocated. No rank ever holds more than its shard and one
full matrix. A weight's initial value depends only on the seed and the weight's name, not on the number of ranks.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyllama import hardware
from tinyllama.data.store import TokenStore
from tinyllama.distributed import World, build_mesh, shard_model, smallest_device_memory
from tinyllama.errors import InputError, first_line, silence_torchao
from tinyllama.evaluate.results import Evaluation
from tinyllama.files import atomic_write, read_regular_file, sha256_of, write_json
from tinyllama.formatting import echo
from tinyllama.loading import HuggingFaceLlama
from tinyllama.model import attention
from tinyllama.model.flops import keeps_weights, num_parameters
from tinyllama.model.llama import PRECISIONS, Llama, initialize
from tinyllama.model.weights import stacked_rows
from tinyllama.recipe import Model, Optimizer, Recipe, Train, differences
from tinyllama.runs.run_dir import RunDir, batches_of
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.muon import Muon
from tinyllama.train.samples import sample_prompts
from tinyllama.train.validation import ValidationSet, load_validation_set

Float8Scaling = Literal["rowwise", "tensorwise"]
"""Recipes of torchao: one scale per row, or one scale per tensor, which is faster and less exact."""
Evaluator = Callable[[Llama, int, Callable[[], None]], Evaluation]
"""Function of the model, the number of completed steps and a heartbeat; see `evaluate.evaluation.load_evaluator`."""


@dataclass
class TrainState:
    """The objects that a training step needs. `resume` initializes or loads the weights."""

    recipe: Recipe
    store: TokenStore
    tokenizer: Tokenizer
    world: World
    run: RunDir
    model: Llama
    optimizers: list[torch.optim.Optimizer]
    validation_set: ValidationSet | None
    sample_prompts: list[str]
    milestone_steps: set[int]
    keeps_weights: bool = False
    """Whether weights in the compute precision are kept over the micro-batches of a step."""
    evaluate: Evaluator | None = None
    """Function that evaluates the model on lm-eval's tasks; None if the recipe has no evaluation during training."""
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    """Records of the run's rollbacks; see `RunDir.rollbacks`."""

    @property
    def skipped_batches(self) -> frozenset[int]:
        """Indices of the batches excluded from training."""
        return batches_of(self.rollbacks)


def build(recipe: Recipe, world: World) -> TrainState:
    """Open the store and build the model without initializing its weights.

    Raises InputError if the store, the tokenizer, the initial weights, the number of ranks or the prompts of samples do
    not fit the recipe.
    """
    store, tokenizer = TokenStore.open(recipe.data.store), Tokenizer.load(recipe.tokenizer)
    if store.manifest["tokenizer"]["digest"] != tokenizer.digest:
        raise InputError(
            f"{recipe.tokenizer}: not the tokenizer that {recipe.data.store} was made with; set `tokenizer` to the "
            "store's tokenizer, or prepare another data.store"
        )
    recipe.train.sequences_per_rank(world.size)  # raises if the batch does not divide among the ranks
    run = RunDir.of_recipe(recipe)
    vocab_size = _vocab_size(recipe, run, tokenizer)
    tokenizer = tokenizer.fitted(vocab_size)
    keeps = run_keeps_weights(recipe, vocab_size, world)
    model = build_model(recipe, vocab_size, world, keeps_weights=keeps)
    if recipe.train.deterministic and world.device.type == "cuda":
        # required for reproducible results (cuBLAS's documentation, "Results reproducibility")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return TrainState(
        recipe,
        store,
        tokenizer,
        world,
        run,
        model,
        build_optimizers(model, recipe.train.optimizer),
        load_validation_set(recipe, store, tokenizer),
        sample_prompts(recipe, store, tokenizer),
        recipe.milestone_steps(),
        keeps,
    )


def run_keeps_weights(recipe: Recipe, vocab_size: int, world: World) -> bool:
    """Return whether this run keeps weights over the micro-batches of a step; all ranks return the same value."""
    train, parameters = recipe.train, num_parameters(recipe.model, vocab_size)
    micro_batches = train.sequences_per_rank(world.size) // train.effective_micro_batch_size(world.size)
    element_bytes = PRECISIONS[train.precision].itemsize
    return keeps_weights(parameters, element_bytes, micro_batches, world.size > 1, smallest_device_memory(world))


def _vocab_size(recipe: Recipe, run: RunDir, tokenizer: Tokenizer) -> int:
    """Return the number of embedding rows of the initial weights, or else the tokenizer's vocabulary size."""
    record = run.initial_weights()
    if record and record["source"] == recipe.train.initial_weights:
        return int(record["vocab_size"])
    initial = open_initial_weights(recipe, tokenizer)
    return initial.vocab_size if initial else tokenizer.vocab_size


def build_model(
    recipe: Recipe,
    vocab_size: int,
    world: World,
    float8_scaling: Float8Scaling = "rowwise",
    keeps_weights: bool = False,
) -> Llama:
    """Return the recipe's model, sharded and compiled as configured, in uninitialized memory on the rank's device.

    Training always uses float8 products with one scale per row; benchmarks set `float8_scaling` to compare both
    scalings.
    """
    with torch.device("meta"):
        model = Llama(recipe.model, vocab_size, PRECISIONS[recipe.train.precision])
    check_precision(recipe.train, world)
    if recipe.train.float8:
        enable_float8(model, world, float8_scaling)
    model.set_activation_checkpointing(recipe.parallel.activation_checkpointing)
    if recipe.train.compile:
        _compile(model, world)
    if world.size > 1:
        shard_model(model, build_mesh(recipe.parallel, world), keeps_weights)
    return model.to_empty(device=world.device)


def _compile(model: Llama, world: World) -> None:
    """Compile each block, if torch.compile works on this machine.

    All blocks share one compiled graph. The embedding is not compiled, because its compiled backward pass is not
    deterministic. Only the block's `forward` is compiled, not its `__call__`, so that FSDP's hooks stay outside the
    graph.
    """
    if hardware.can_compile(world.device):
        # torch's cache of compiled code does not notice a change of a custom operator between two versions.
        torch.compiler.config.cache_key_tag = sha256_of(Path(attention.__file__))
        for block in model.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
    elif world.is_main:
        reasons = "no C++ compiler, no Python headers, or a GPU older than Volta"
        echo(f"train.compile: not possible ({reasons}); training is slower without compilation", to_stderr=True)


def check_precision(train: Train, world: World) -> None:
    """Raise InputError if training needs bf16 and the GPU does not support it; warn about fp16 on a CPU."""
    if world.device.type == "cuda":
        hardware.check_bf16(
            train.precision,
            train.optimizer.name,
            torch.cuda.get_device_name(world.device),
            torch.cuda.get_device_capability(world.device),
        )
    elif train.precision == "fp16" and world.is_main:
        echo(hardware.FP16_ON_CPU_WARNING, to_stderr=True)


def enable_float8(model: Llama, world: World, scaling: Float8Scaling = "rowwise") -> None:
    """Convert the blocks' linear layers to torchao's float8 matrix products, with one scale per row or per tensor.

    Raises InputError if the device does not support float8 matrix products or torchao cannot be imported.
    """
    if world.device.type != "cuda" or torch.cuda.get_device_capability(world.device) < hardware.FLOAT8_CAPABILITY:
        raise InputError(
            f"train.float8: {world.device} does not support float8 matrix products; use an Ada, Hopper or newer GPU, "
            "or remove train.float8"
        )
    silence_torchao()
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # noqa: PLC0415
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "torchao"
        problem = "is missing" if is_missing else f"does not work with torch {torch.__version__} ({first_line(error)})"
        packages = "'tinyllama[float8]'" if is_missing else "torch torchao"
        remedy = f"pip install -U {packages}, or remove train.float8"
        raise InputError(f"train.float8: torchao {problem}; {remedy}") from None
    convert_to_float8_training(model.blocks, config=Float8LinearConfig.from_recipe_name(scaling))


def build_optimizers(model: Llama, recipe: Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a model; each parameter belongs to exactly one optimizer.

    `adamw` is AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) for all parameters. Weight decay applies to matrices
    and embeddings but not to norms. `muon` is Muon (Jordan et al. 2024; train/muon.py) for the matrices of the
    blocks, and AdamW for all other parameters. Muon treats the parts of each stacked matrix (query, key and value; gate
    and up) as separate matrices. Muon's updates are scaled to the root mean square of AdamW's updates (Liu et al. 2025,
    arXiv:2502.16982), so both optimizers use the same learning rate and weight decay. `recipe.embedding_learning_rate`
    replaces the rate of the embedding and the output head. Muon computes in float32 if the model does, else in bf16.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim > 1] if recipe.name == "muon" else []
    ids_of_matrices = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in ids_of_matrices]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ]
    if recipe.embedding_learning_rate is not None:
        ids_of_embeddings = {id(model.embedding.weight), id(model.head_weight)}
        embeddings = [p for p in others if id(p) in ids_of_embeddings]
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in ids_of_embeddings]
        ratio = recipe.embedding_learning_rate / recipe.learning_rate
        groups.append({"params": embeddings, "weight_decay": recipe.weight_decay, "lr_ratio": ratio})
    groups = [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    if not matrices:
        return [adamw]
    parts = {p: rows for name, p in model.named_parameters() if (rows := stacked_rows(name, model.config))}
    steps = recipe.newton_schulz_steps or 5
    hyperparameters = recipe.learning_rate, recipe.weight_decay, recipe.momentum, steps, recipe.normalize_rows
    dtype = torch.float32 if model.precision == torch.float32 else torch.bfloat16
    return [Muon(matrices, *hyperparameters, dtype, parts), adamw]


def optimizer_step(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Run one step of each optimizer with this learning rate, times the `lr_ratio` of groups that have one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
        optimizer.step()


def clip_grad_norm(model: nn.Module, max_norm: float, loss_scale: float = 1.0) -> Tensor:
    """Divide the gradient by `loss_scale`, clip it to a global norm of `max_norm`, and return the norm before clipping.

    The norm is that of the gradient over all ranks.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if loss_scale != 1:
        torch._foreach_mul_(gradients, 1 / loss_scale)
    # By default, torch launches one kernel per tensor for DTensors.
    is_on_gpu = bool(gradients) and gradients[0].device.type == "cuda"
    foreach = True if is_on_gpu else None
    norm = nn.utils.get_total_norm(gradients, foreach=foreach)
    global_norm: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if is_on_gpu or global_norm > max_norm:  # the comparison would make the CPU wait for a GPU
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm, foreach)
    return global_norm


def open_initial_weights(recipe: Recipe, tokenizer: Tokenizer) -> HuggingFaceLlama | None:
    """Return the external weights that the first step starts from, or None.

    Raises InputError if the shape of the weights differs from the recipe, or if a token has no embedding row.
    """
    if recipe.train.initial_weights is None:
        return None
    initial = HuggingFaceLlama.open(recipe.train.initial_weights)
    for name, (here, there) in differences(_shape(recipe.model), _shape(initial.config)):
        if not (_is_rounded(here, there) or _is_extension(name, recipe.model, initial.config)):
            raise InputError(f"model.{name}: is {here}, but {there} in {initial.folder}; make them equal")
    tokenizer.fitted(initial.vocab_size)  # raises if a token has no embedding row
    return initial


def _position_changes(here: Model, there: Model) -> list[str]:
    """Return one line per field of the context or the rotary embedding that differs.

    `here` is the recipe's model, and `there` is that of the weights.
    """
    fields = {"context_length", "rope_theta", "rope_scaling"}
    found = differences(there.model_dump(include=fields), here.model_dump(include=fields))
    return [f"model.{name} was {then}, is {now}" for name, (then, now) in found if not _is_rounded(now, then)]


def _shape(model: Model) -> dict[str, Any]:
    """Return the fields of a model that its weights depend on; no weight depends on the context length."""
    return model.model_dump(exclude={"context_length"}) | {"head_dim": model.head_dim}


def _is_rounded(here: object, there: object) -> bool:
    """Return whether two values differ only because a file format rounded them to float32."""
    return isinstance(here, float) and isinstance(there, float) and math.isclose(here, there, rel_tol=1e-6)


def _is_extension(name: str, here: Model, there: Model) -> bool:
    """Return whether a field may differ from that of the weights, because it extends the model's context.

    A longer context may have a larger `rope_theta`, or another `rope_scaling`. Any other difference in these fields is
    usually a mistake, which makes the predictions much worse.
    """
    if here.context_length <= there.context_length or here.rope_theta < there.rope_theta:
        return False
    is_scaled = here.rope_scaling is not None or there.rope_scaling is None
    return is_scaled and name.partition(".")[0] in ("rope_theta", "rope_scaling")


def initialize_weights(state: TrainState) -> None:
    """Initialize the weights, record their source in the run, and reset the optimizers."""
    recipe = state.recipe
    initial = open_initial_weights(recipe, state.tokenizer)
    if initial:
        initial.load_into(state.model)
    else:
        initialize(state.model, recipe.seed)
    if state.world.is_main:
        if initial:
            record: dict[str, Any] = {"source": recipe.train.initial_weights, "digest": initial.digest}
            changes = _position_changes(recipe.model, initial.config)
            record |= {"vocab_size": initial.vocab_size} | ({"changed": changes} if changes else {})
            write_json(state.run.initial_weights_path, record)
        else:
            state.run.initial_weights_path.unlink(missing_ok=True)
    state.optimizers = build_optimizers(state.model, recipe.train.optimizer)


def write_run_folder(state: TrainState) -> None:
    """Write the recipe, the store's manifest and the tokenizer into the run, so that the run is self-contained."""
    with atomic_write(state.run.recipe_path) as file:
        file.write(state.recipe.to_yaml().encode())
    with atomic_write(state.run.store_manifest_path) as file:
        file.write(read_regular_file(state.store.folder / "manifest.json"))
    state.tokenizer.save(state.run.tokenizer_dir, state.recipe.model.context_length)
