"""Our parameter names and Hugging Face's: the same numbers under other names.

Hugging Face keeps query, key and value, and gate and up, as matrices of their own; ours are stacked in that order.
Both rotate dimension i with i + E/2, so no row is permuted.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tinyllama.errors import InputError
from tinyllama.recipe import Model
from tinyllama.recipe.loading import format_validation_error

# Inside a block: our name -> Hugging Face's, in the order in which their rows are stacked.
_BLOCK = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down": ("mlp.down_proj",),
}


def _names(shape: Model) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "embedding.weight", ("model.embed_tokens.weight",)
    for layer in range(shape.layers):
        for ours, theirs in _BLOCK.items():
            yield (
                f"blocks.{layer}.{ours}.weight",
                tuple(f"model.layers.{layer}.{name}.weight" for name in theirs),
            )
    yield "norm.weight", ("model.norm.weight",)
    if not shape.tie_embeddings:
        yield "head.weight", ("lm_head.weight",)


def _rows(ours: str, shape: Model) -> list[int]:
    if ours.endswith("attention.qkv.weight"):
        return [count * shape.head_dim for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
    return [shape.ffn_dim, shape.ffn_dim]


def to_hugging_face(state: Mapping[str, Tensor], shape: Model) -> Iterator[tuple[str, Tensor]]:
    """Our state dict as (name, tensor) pairs of Hugging Face's LlamaForCausalLM, views where possible."""
    for ours, theirs in _names(shape):
        parts = state[ours].split(_rows(ours, shape)) if len(theirs) > 1 else (state[ours],)
        yield from zip(theirs, parts, strict=True)


def from_hugging_face(state: Mapping[str, Tensor], shape: Model) -> Iterator[tuple[str, Tensor]]:
    """A LlamaForCausalLM's state dict as (name, tensor) pairs under our names, each read when its turn comes.

    Raises InputError, before the first, where a tensor is missing or one is left over that the shape has no place for.
    """
    used = [part for _, theirs in _names(shape) for part in theirs]
    for part in used:
        if part not in state:
            raise InputError(f"the weights lack {part}; {_how_to_complete(part)}")
    foreign = sorted(name for name in state.keys() - set(used) if not name.endswith("rotary_emb.inv_freq"))
    if shape.tie_embeddings:
        foreign = [name for name in foreign if name != "lm_head.weight"]
    if foreign:
        raise InputError(
            f"the weights hold {foreign[0]}, which a Llama has no place for; {_how_to_fit(foreign[0], shape)}"
        )
    return ((name, _concat([state[part] for part in theirs])) for name, theirs in _names(shape))


def _how_to_complete(name: str) -> str:
    if name == "lm_head.weight":
        return "if the head is the embedding, set tie_word_embeddings to true in config.json, else fetch or save it too"
    return "fetch all of its files, or save a whole LlamaForCausalLM with transformers' save_pretrained"


def _how_to_fit(name: str, shape: Model) -> str:
    parts = name.removeprefix("model.layers.").split(".")
    if parts[0].isdigit() and int(parts[0]) >= shape.layers:
        return f"config.json has num_hidden_layers {shape.layers}: fetch or make both again"
    return "only plain Llama 2 weights load: merge adapters and dequantize first, or use another model"


def _concat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@torch.no_grad()
def load_parameters(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Give each named parameter of a model its value, or where it is sharded this rank's part of it.

    Raises InputError where a value has another size.
    """
    parameters = dict(model.named_parameters())
    for name, value in values:
        parameter = parameters.pop(name)
        if parameter.shape != value.shape:
            sizes = f"{name} is {list(value.shape)}, but the model's is {list(parameter.shape)}"
            raise InputError(f"the weights do not fit config.json ({sizes}); fetch or make both again")
        if isinstance(parameter, DTensor):  # every rank has the whole value: each takes its part, and nothing is sent
            mesh, placements = parameter.device_mesh, parameter.placements
            part = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
            parameter.copy_(part)
        else:
            parameter.copy_(value)
    assert not parameters, f"left without a value: {sorted(parameters)}"


def config_to_hugging_face(shape: Model, vocab_size: int, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """The contents of config.json for LlamaForCausalLM, in the names that transformers 4 and 5 both read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.dim,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn_dim,
        "max_position_embeddings": shape.context_length,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tie_embeddings,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


_LARGEST = 1 << 31  # more than any size of a Llama; torch has none from 2^63 on
_CORRECT = "correct it, or fetch the file again"
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)


def config_from_hugging_face(config: Mapping[str, Any]) -> Model:
    """The shape that a config.json describes. Raises InputError, naming the field, for what is not Llama 2's."""
    _require("model_type", config.get("model_type"), "llama")
    for field in _NEEDED:
        if not isinstance(config.get(field), int | float) or not abs(config[field]) < _LARGEST:
            raise InputError(f"config.json: {field} is {config.get(field)!r}, not a number below 2^31; {_CORRECT}")
    if config["vocab_size"] < 1 or config["vocab_size"] % 1:
        raise InputError(f"config.json: vocab_size is {config['vocab_size']!r}, not a count; {_CORRECT}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    quantization = config.get("quantization_config") or {}
    for field, value in (("rope_parameters", rope), ("quantization_config", quantization)):
        if not isinstance(value, dict):
            raise InputError(f"config.json: {field} is {value!r}, not an object; {_CORRECT}")
    _require("hidden_act", config.get("hidden_act", "silu"), "silu")
    _require("attention_bias", config.get("attention_bias", False), False)
    _require("mlp_bias", config.get("mlp_bias", False), False)
    _require("rope type", rope.get("rope_type", rope.get("type", "default")), "default")
    _require("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    _require("quantization_config", quantization.get("quant_method"), None)
    heads = config["num_attention_heads"]
    try:
        shape = Model(
            dim=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            ffn_dim=config["intermediate_size"],
            context_length=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            tie_embeddings=config.get("tie_word_embeddings", False),
        )
    except ValidationError as error:
        raise InputError(
            f"config.json: no shape of a Llama ({format_validation_error(error, Model)}); {_CORRECT}"
        ) from None
    _require("head_dim", config.get("head_dim") or shape.head_dim, shape.head_dim)
    return shape


def _require(field: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        how = "save the model dequantized" if field == "quantization_config" else "use a model of that kind"
        raise InputError(f"config.json: {field} is {found!r}; only Llama 2's {wanted!r} can be loaded: {how}")
