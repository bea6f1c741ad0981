"""Conversion of weight names and configurations to and from Hugging Face's LlamaForCausalLM.

The values of the weights do not change. Hugging Face has separate matrices for query, key and value, and for gate and
up. `model.llama` stacks these matrices in this order. Hugging Face and `model.llama` both rotate dimension i of a head
with dimension i + E/2, where E is the width of a head, so no row is permuted.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tinyllama.errors import InputError, UnsupportedModelError
from tinyllama.recipe import Model, RopeScaling
from tinyllama.recipe.loading import format_validation_error

_BLOCK = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down": ("mlp.down_proj",),
}
"""Names of a block's weights: the name in `model.llama`, and Hugging Face's names in the order of the stacked rows."""


def _names(config: Model) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "embedding.weight", ("model.embed_tokens.weight",)
    for layer in range(config.layers):
        for ours, theirs in _BLOCK.items():
            yield f"blocks.{layer}.{ours}.weight", tuple(f"model.layers.{layer}.{name}.weight" for name in theirs)
    yield "norm.weight", ("model.norm.weight",)
    if not config.tie_embeddings:
        yield "head.weight", ("lm_head.weight",)


def stacked_rows(name: str, config: Model) -> list[int]:
    """Return the number of rows of each matrix that the parameter `name` stacks; empty if it stacks none."""
    if name.endswith("attention.qkv.weight"):
        return [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
    return [config.ffn_dim] * 2 if name.endswith("ffn.gate_up.weight") else []


def to_hugging_face(state: Mapping[str, Tensor], config: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield a state dict's tensors by LlamaForCausalLM's names, as views where possible."""
    for ours, theirs in _names(config):
        rows = stacked_rows(ours, config) or [len(state[ours])]
        yield from zip(theirs, state[ours].split(rows), strict=True)


def from_hugging_face(state: Mapping[str, Tensor], config: Model) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over a LlamaForCausalLM's tensors by `model.llama`'s names; each is read when it is yielded.

    Raises InputError immediately if a tensor is missing, or if `state` has a tensor that a network of this
    configuration does not have.
    """
    used = [part for _, theirs in _names(config) for part in theirs]
    for part in used:
        if part not in state:
            raise InputError(
                f"the weights do not contain {part}; download all files, or save a complete LlamaForCausalLM with "
                "save_pretrained (if the model has no lm_head.weight, set tie_word_embeddings to true in config.json)"
            )
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    unused = sorted(name for name in state.keys() - set(used) - ignored if not name.endswith("rotary_emb.inv_freq"))
    if unused:
        raise InputError(
            f"the weights contain {unused[0]}, which a Llama with num_hidden_layers {config.layers} does not have; "
            "download config.json again; merge adapters, dequantize, or use a plain Llama model"
        )
    return ((name, _concat([state[part] for part in theirs])) for name, theirs in _names(config))


def _concat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@torch.no_grad()
def load_parameters(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Copy named values into a model's parameters; a sharded parameter takes this rank's part of the full value.

    Raises InputError if the shape of a value differs from that of its parameter.
    """
    parameters = dict(model.named_parameters())
    for name, value in values:
        parameter = parameters.pop(name)
        if parameter.shape != value.shape:
            sizes = f"{name} has shape {list(value.shape)}, the model needs {list(parameter.shape)}"
            raise InputError(f"the weights do not fit config.json ({sizes}); download or save both again")
        if isinstance(parameter, DTensor):
            # Every rank has the full value, so each rank takes its own part without communication.
            mesh, placements = parameter.device_mesh, parameter.placements
            part = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
            parameter.copy_(part)
        else:
            parameter.copy_(value)
    assert not parameters, f"no value for {sorted(parameters)}"


def config_to_hugging_face(config: Model, vocab_size: int, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """Return the contents of a config.json for LlamaForCausalLM, with names that transformers 4 and 5 both read."""
    scaling = _scaling_to_hugging_face(config.rope_scaling) if config.rope_scaling else {}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.context_length,
        "mlp_bias": False,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **({"rope_scaling": scaling} if scaling else {}),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def _scaling_to_hugging_face(scaling: RopeScaling) -> dict[str, Any]:
    fields = {theirs: getattr(scaling, ours) for theirs, ours in _SCALING.items()}
    return {name: value for name, value in fields.items() if value is not None}


_SCALING = {
    "rope_type": "type",
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context_length",
}
"""Hugging Face's names of the fields of `model.rope_scaling`."""

_CONTEXT_NAMES = {
    "context_length": "max_position_embeddings",
    "original_context_length": "original_max_position_embeddings",
}
"""Hugging Face's names in messages that name fields of `Model`."""

_Size = Annotated[int, Field(gt=0, lt=1 << 31)]
_RopeType = Literal["default", "linear", "llama3"]
_CompleteHead = Annotated[float, Field(ge=1, le=1)]
"""Fraction of a head's dimensions that are rotated."""


class _Rope(BaseModel):
    """Rotary embedding settings of a config.json: `rope_parameters`, or `rope_scaling` of transformers 4.

    Old files have `type` instead of `rope_type`.
    """

    type: _RopeType | None = None
    rope_type: _RopeType | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: _CompleteHead | None = None


class _LlamaConfig(BaseModel):
    """Fields of a config.json that determine the network, restricted to the values that `model.llama` supports."""

    model_type: Literal["llama"]
    hidden_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    intermediate_size: _Size
    max_position_embeddings: _Size
    vocab_size: _Size
    rms_norm_eps: float
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: _CompleteHead | None = None
    quantization_config: None = None


def config_from_hugging_face(config: object) -> tuple[Model, int]:
    """Return the model configuration and the vocabulary size of a parsed config.json.

    Raises UnsupportedModelError, with the field's name, if the config.json does not describe a network of
    `model.llama`, and InputError if the values of a Llama contradict each other.
    """
    try:
        found = _LlamaConfig.model_validate(config)
    except ValidationError as error:
        raise UnsupportedModelError(_config_problem(error)) from None
    theta, scaling = _rope_settings(found)
    try:
        model = Model(
            dim=found.hidden_size,
            layers=found.num_hidden_layers,
            heads=found.num_attention_heads,
            kv_heads=found.num_key_value_heads or found.num_attention_heads,
            head_dim=found.head_dim,
            ffn_dim=found.intermediate_size,
            context_length=found.max_position_embeddings,
            norm_eps=found.rms_norm_eps,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=found.tie_word_embeddings,
        )
    except ValidationError as error:
        raise InputError(_config_problem(error)) from None
    return model, found.vocab_size


def _config_problem(error: ValidationError) -> str:
    problem = format_validation_error(error, Model).partition(";")[0]  # its remedy is for a recipe
    for ours, theirs in _CONTEXT_NAMES.items():
        problem = re.sub(rf"\b{ours}\b", theirs, problem)
    return f"config.json: {problem}; use a Llama model that is not quantized, or download the file again"


def _rope_settings(found: _LlamaConfig) -> tuple[float, dict[str, Any] | None]:
    """Return the base of the rotary embedding, and the fields of its scaling, from all places of a config.json.

    Raises InputError if two places contradict each other.
    """
    settings: dict[str, Any] = {}
    parts = [_Rope(rope_theta=found.rope_theta), found.rope_parameters, found.rope_scaling]
    if any(part and "llama3" in (part.type, part.rope_type) for part in parts):  # transformers 5 prefers this field
        parts.append(_Rope(original_max_position_embeddings=found.original_max_position_embeddings))
    for part in parts:
        for field, value in part.model_dump(exclude_none=True).items() if part else ():
            name = "rope_type" if field == "type" else field
            if settings.setdefault(name, value) != value:
                raise InputError(
                    f"config.json: rope_theta, rope_parameters and rope_scaling contradict each other ({name} is both "
                    f"{settings[name]} and {value}); set the values of the original model"
                )
    theta = settings.pop("rope_theta", 10000.0)
    if settings.get("rope_type") == "default":
        del settings["rope_type"]
        if extra := [name for name in _SCALING if name in settings]:
            raise InputError(
                f"config.json: {extra[0]} is {settings[extra[0]]}, but rope_type is default, which has no {extra[0]}; "
                "set the values of the original model"
            )
    return theta, {_SCALING[name]: value for name, value in settings.items() if name in _SCALING} or None
