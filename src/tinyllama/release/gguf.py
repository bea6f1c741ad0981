"""A Hugging Face folder as GGUF, which llama.cpp runs: F16, and from it Q8_0 and Q4_K_M by llama.cpp's own quantiser.

Weights are read, converted and written one at a time. llama.cpp rotates neighbours (dimensions 2i and 2i + 1) where
Hugging Face rotates i and i + E/2, so the rows of each head's query and key change places.
"""

from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from tinyllama.errors import InputError
from tinyllama.loading import HuggingFaceLlama, Safetensors
from tinyllama.recipe import Model
from tinyllama.release.gguf_tokenizer import add_tokenizer
from tinyllama.release.huggingface import CHAT_TEMPLATE
from tinyllama.release.isolation import convert
from tinyllama.tokenizer.backends import read_tokenizer

QUANTISED = ("Q8_0", "Q4_K_M")


def write_gguf(folder: Path, source: Path, name: str) -> None:
    """Write NAME-F16.gguf, NAME-Q8_0.gguf and NAME-Q4_K_M.gguf into `folder` from a Hugging Face Llama's folder.

    Raises InputError where llama.cpp has no tokenizer of its kind or float16 no place for a weight, and RunStoppedError
    where llama.cpp's quantiser fails or crashes.
    """
    folder.mkdir(parents=True)
    whole = folder / f"{name}-F16.gguf"
    _write_f16(whole, HuggingFaceLlama.open(source), name)
    for kind in QUANTISED:
        convert("llama_cpp", "quantise", str(whole), str(folder / f"{name}-{kind}.gguf"), kind)


def _write_f16(path: Path, there: HuggingFaceLlama, name: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    _add_shape(writer, there, name)
    add_tokenizer(writer, read_tokenizer(there.folder), there.vocab_size)
    if (there.folder / CHAT_TEMPLATE).is_file():
        writer.add_chat_template((there.folder / CHAT_TEMPLATE).read_text(encoding="utf-8"))
    stored = Safetensors(there.files())
    names = _names(stored, there.config)
    for theirs, ours in names.items():
        shape = stored[ours].shape
        is_vector = len(shape) == 1
        dtype = np.dtype(np.float32 if is_vector else np.float16)
        writer.add_tensor_info(theirs, shape, dtype, shape.numel() * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for ours in names.values():
        writer.write_tensor_data(_converted(ours, stored[ours], there.config).numpy())
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, there: HuggingFaceLlama, name: str) -> None:
    shape = there.config
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(there.vocab_size)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn_dim)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)


def _names(stored: Safetensors, shape: Model) -> dict[str, str]:
    """GGUF's name of each tensor, and Hugging Face's; a tied head is llama.cpp's own business."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    names = {name: table.get_name(name, try_suffixes=(".weight",)) for name in stored}
    if shape.tie_embeddings:
        names.pop("lm_head.weight", None)
    return {theirs: ours for ours, theirs in names.items() if theirs is not None}


def _converted(name: str, tensor: Tensor, shape: Model) -> Tensor:
    """A tensor as GGUF has it: matrices in float16, vectors in float32, because llama.cpp's norms are."""
    if tensor.ndim == 1:
        return tensor.float()
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
    half = (permute_rope_rows(tensor, heads) if heads else tensor).half().contiguous()
    if not half.isfinite().all():
        raise InputError(f"{name}: a weight is over 65504, which float16 does not hold; release it without gguf")
    return half


def permute_rope_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * E, D] of a query or key, for a rotation of 2i with 2i + 1 instead of i with i + E/2."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
