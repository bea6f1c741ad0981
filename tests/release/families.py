"""Small models with the fields of the real config.json and the kind of tokenizer of each family of Llamas.

Only sizes, context lengths and token ids are smaller than those of the real models.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tinyllama.tokenizer import Tokenizer

_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
_ALL = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama",
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_LLAMA_3 = {"attention_bias": False, "attention_dropout": 0.0, "rope_theta": 500000.0, "num_key_value_heads": 2}


def _llama3_scaling(factor: float) -> dict[str, Any]:
    return {
        "factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }  # fmt: skip


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": (
        "llama2",
        {
            "max_position_embeddings": 256, "num_key_value_heads": 4, "rope_scaling": None,
            "tie_word_embeddings": False, "transformers_version": "4.31.0.dev0",
        },
    ),
    "Llama 3": (
        "llama3",
        {
            **_LLAMA_3, "max_position_embeddings": 256, "rope_scaling": None, "tie_word_embeddings": False,
            "transformers_version": "4.40.0.dev0",
        },
    ),
    "Llama 3.1": (
        "llama3",
        {
            **_LLAMA_3, "max_position_embeddings": 1024, "mlp_bias": False, "rope_scaling": _llama3_scaling(8.0),
            "tie_word_embeddings": False, "transformers_version": "4.43.0.dev0",
        },
    ),
    "Llama 3.2": (
        "llama3",
        {
            **_LLAMA_3, "head_dim": 16, "max_position_embeddings": 1024, "mlp_bias": False,
            "rope_scaling": _llama3_scaling(32.0), "tie_word_embeddings": True, "transformers_version": "4.45.0.dev0",
        },
    ),
    "SmolLM2": (
        "smollm",
        {
            "attention_bias": False, "attention_dropout": 0.0, "hidden_size": 48, "initializer_range": 0.0417,
            "is_llama_config": True, "max_position_embeddings": 256, "mlp_bias": False, "num_attention_heads": 3,
            "num_key_value_heads": 1, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
            "tie_word_embeddings": True, "transformers_version": "4.40.1",
        },
    ),
    "TinyLlama": (
        "llama2",
        {
            "attention_bias": False, "max_position_embeddings": 256, "num_key_value_heads": 1, "rope_scaling": None,
            "rope_theta": 10000.0, "tie_word_embeddings": False, "transformers_version": "4.35.0",
        },
    ),
}  # fmt: skip
"""Kind of the tokenizer of each family, and the fields of its config.json that differ from `_ALL` and `_SIZES`."""


def write_family(folder: Path, name: str, tokenizers: Mapping[str, Path]) -> Path:
    """Write a family's model with random weights into a new folder."""
    kind, own = FAMILIES[name]
    tokenizer = Tokenizer.load(tokenizers[kind])
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
    config = _ALL | _SIZES | own | ids
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.bfloat16().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copytree(tokenizers[kind], folder, dirs_exist_ok=True)
    return folder
