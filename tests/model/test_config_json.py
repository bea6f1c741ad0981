"""config.json of public Llamas is read as published, and what is written has the same network in transformers."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tinyllama.model.flops import num_parameters
from tinyllama.model.rope import rope_frequencies
from tinyllama.model.weights import config_from_hugging_face, config_to_hugging_face

COMMON = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5}
LLAMA3 = COMMON | {"num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256}
SMOLLM2 = COMMON | {"max_position_embeddings": 8192, "rope_scaling": None, "vocab_size": 49152}
TIED = {"tie_word_embeddings": True}
SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def shape(dim: int, ffn_dim: int, layers: int, heads: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (dim, ffn_dim, layers, heads), strict=True))


LONG = {"max_position_embeddings": 131072}
LLAMA_3_1 = LLAMA3 | LONG | {"rope_scaling": SCALING}
LLAMA_3_2 = LLAMA3 | LONG | TIED | {"rope_scaling": SCALING | {"factor": 32.0}}
PUBLIC: dict[str, tuple[dict[str, Any], int]] = {
    "TinyLlama 1.1B": (
        COMMON
        | shape(2048, 5632, 22, 32)
        | {"num_key_value_heads": 4, "max_position_embeddings": 2048, "rope_scaling": None, "vocab_size": 32000},
        1_100_048_384,
    ),
    "Llama 3 8B": (
        LLAMA3 | shape(4096, 14336, 32, 32) | {"max_position_embeddings": 8192, "rope_scaling": None},
        8_030_261_248,
    ),
    "Llama 3.1 8B": (LLAMA_3_1 | shape(4096, 14336, 32, 32), 8_030_261_248),
    "Llama 3.2 1B": (LLAMA_3_2 | shape(2048, 8192, 16, 32) | {"head_dim": 64}, 1_235_814_400),
    "Llama 3.2 3B": (LLAMA_3_2 | shape(3072, 8192, 28, 24) | {"head_dim": 128}, 3_212_749_824),
    "SmolLM2 135M": (
        SMOLLM2 | TIED | shape(576, 1536, 30, 9) | {"num_key_value_heads": 3, "rope_theta": 100000},
        134_515_008,
    ),
    "SmolLM2 1.7B": (
        SMOLLM2 | TIED | shape(2048, 8192, 24, 32) | {"num_key_value_heads": 32, "rope_theta": 130000},
        1_711_376_384,
    ),
}
"""Fields of config.json as transformers 4 wrote them, and the number of parameters, of public models."""


def transformers_frequencies(fields: dict[str, Any]) -> torch.Tensor:
    frequencies = LlamaRotaryEmbedding(LlamaConfig(**fields)).inv_freq
    assert isinstance(frequencies, torch.Tensor)
    return frequencies


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configuration_has_its_parameters_and_frequencies(name: str) -> None:
    fields, parameters = PUBLIC[name]
    config, vocab_size = config_from_hugging_face(fields)
    assert num_parameters(config, vocab_size) == parameters
    assert torch.equal(rope_frequencies(config), transformers_frequencies(fields))


@pytest.mark.parametrize("name", PUBLIC)
def test_written_configuration_is_the_same_network_for_transformers_4_and_5(name: str) -> None:
    fields, _ = PUBLIC[name]
    config, vocab_size = config_from_hugging_face(fields)
    written = config_to_hugging_face(config, vocab_size, 1, 2)
    old, new = ("rope_theta", "rope_scaling"), ("rope_parameters",)
    for unknown in ((), new, old):  # transformers 4 does not know the new field, and a later version may drop the old
        kept = {field: value for field, value in written.items() if field not in unknown}
        assert config_from_hugging_face(kept) == (config, vocab_size)
        assert torch.equal(transformers_frequencies(kept), rope_frequencies(config))
    expected, found = LlamaConfig(**fields).to_dict(), LlamaConfig(**written).to_dict()
    specific = {"architectures", "dtype", "torch_dtype", "bos_token_id", "eos_token_id"}
    assert {field: found[field] for field in found if field not in specific} == {
        field: expected[field] for field in expected if field not in specific
    }
