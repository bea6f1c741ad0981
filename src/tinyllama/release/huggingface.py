"""Writes a model as a Hugging Face folder, which transformers and compatible libraries load without extra code.

The weights are written as bf16 safetensors, one shard of at most 5 GB at a time, so memory holds the model and one
shard.
"""

import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from tinyllama.files import write_json
from tinyllama.model.llama import Llama
from tinyllama.model.weights import config_to_hugging_face, to_hugging_face
from tinyllama.tokenizer import Tokenizer

SHARD_BYTES = 5 * 10**9
CHAT_TEMPLATE = "chat_template.jinja"
"""Name of the file in which transformers 5 looks for a chat template."""


def write_hugging_face(folder: Path, model: Llama, tokenizer: Tokenizer, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model and its tokenizer into a new folder; split weights into files of at most `shard_bytes`."""
    folder.mkdir(parents=True)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    write_json(folder / "config.json", config_to_hugging_face(model.config, model.vocab_size, bos, eos))
    # EOS pads batches, since Llama 2's vocabulary has no padding token
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos})
    tensors = dict(to_hugging_face(model.state_dict(), model.config))
    sizes = {name: torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta") for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: tensors[name].to("cpu", torch.bfloat16).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors makes files readable by the owner only
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    tokenizer.save(folder, context=model.config.context_length)
