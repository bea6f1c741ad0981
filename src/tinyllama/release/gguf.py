"""Conversion of a Hugging Face folder to GGUF: F16 by this module, Q8_0 and Q4_K_M by llama.cpp.

Weights are read, converted and written one at a time. llama.cpp's RoPE pairs dimensions 2i and 2i + 1 of a head,
whereas Hugging Face pairs i and i + E/2, where E is the head's width. The rows of each head's query and key are
therefore permuted. A Llama-style tokenizer gets llama.cpp's type "llama" (SentencePiece), which merges the pair with
the best score. A byte-level tokenizer gets the type "gpt2". llama.cpp supports only a fixed list of rules that split
text into words, so a tokenizer with another rule is rejected (see `Tokenizer.check_formats`).
"""

from pathlib import Path

import gguf
import numpy as np
from gguf import TokenType
from torch import Tensor

from tinyllama.errors import InputError
from tinyllama.loading import HuggingFaceLlama, Safetensors
from tinyllama.model.rope import rope_frequencies
from tinyllama.recipe import Model
from tinyllama.release.engines import run_conversion
from tinyllama.release.formats import CHAT_TEMPLATE
from tinyllama.tokenizer import pre_tokenizer_name
from tinyllama.tokenizer.backends import Backend, fit_to_embedding, read_tokenizer

QUANTISED = ("Q8_0", "Q4_K_M")
_TOKEN_TYPES = {
    "text": TokenType.NORMAL,
    "byte": TokenType.BYTE,
    "special": TokenType.CONTROL,
    "user": TokenType.USER_DEFINED,
    "unused": TokenType.UNUSED,
}


def write_gguf(folder: Path, source: Path, name: str) -> None:
    """Write NAME-F16.gguf, NAME-Q8_0.gguf and NAME-Q4_K_M.gguf into `folder` from a Hugging Face Llama's folder.

    Raises InputError if llama.cpp does not support the tokenizer or if a weight exceeds the range of float16. Raises
    RunStoppedError if llama.cpp's quantiser fails or crashes.
    """
    folder.mkdir(parents=True)
    f16 = folder / f"{name}-F16.gguf"
    _write_f16(f16, HuggingFaceLlama.open(source), name)
    for kind in QUANTISED:
        run_conversion("llama_cpp", "quantise", str(f16), str(folder / f"{name}-{kind}.gguf"), kind)


def _write_f16(path: Path, source: HuggingFaceLlama, name: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    _add_shape(writer, source, name)
    _add_tokenizer(writer, read_tokenizer(source.folder), source.vocab_size)
    if (source.folder / CHAT_TEMPLATE).is_file():
        writer.add_chat_template((source.folder / CHAT_TEMPLATE).read_text(encoding="utf-8"))
    tensors = Safetensors(source.files())
    names, factors = tensor_names(tensors, source.config), rope_factors(source.config)
    shapes = {gguf_name: tensors[hf_name].shape for gguf_name, hf_name in names.items()}
    shapes |= {gguf_name: tensor.shape for gguf_name, tensor in factors.items()}
    for gguf_name, shape in shapes.items():
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        writer.add_tensor_info(gguf_name, shape, dtype, shape.numel() * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for hf_name in names.values():
        writer.write_tensor_data(_convert_tensor(hf_name, tensors[hf_name], source.config).numpy())
    for tensor in factors.values():
        writer.write_tensor_data(tensor.numpy())
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, source: HuggingFaceLlama, name: str) -> None:
    shape = source.config
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(source.vocab_size)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn_dim)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    if shape.rope_scaling and shape.rope_scaling.type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shape.rope_scaling.factor)
    writer.add_layer_norm_rms_eps(shape.norm_eps)


def tensor_names(tensors: Safetensors, shape: Model) -> dict[str, str]:
    """Return the Hugging Face name of each tensor by its GGUF name.

    A tied head has no entry, because llama.cpp uses the embedding as the head.
    """
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    names = {name: table.get_name(name, try_suffixes=(".weight",)) for name in tensors}
    if shape.tie_embeddings:
        names.pop("lm_head.weight", None)
    return {gguf_name: hf_name for hf_name, gguf_name in names.items() if gguf_name is not None}


def rope_factors(shape: Model) -> dict[str, Tensor]:
    """Return the tensor of Llama 3's scaling by its name: float32[E/2], by which llama.cpp divides the frequencies.

    Other models need no tensor, because GGUF has settings for linear scaling.
    """
    if shape.rope_scaling is None or shape.rope_scaling.type != "llama3":
        return {}
    unscaled = rope_frequencies(shape.model_copy(update={"rope_scaling": None}))
    return {f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight": unscaled / rope_frequencies(shape)}


def _convert_tensor(name: str, tensor: Tensor, shape: Model) -> Tensor:
    """Convert a tensor for GGUF: matrices to float16, vectors to float32, since llama.cpp's norms are float32."""
    if tensor.ndim == 1:
        return tensor.float()
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
    half = (permute_rope_rows(tensor, heads) if heads else tensor).half().contiguous()
    if not half.isfinite().all():
        raise InputError(f"{name}: a weight exceeds 65504, the maximum of float16; release without gguf")
    return half


def permute_rope_rows(weight: Tensor, heads: int) -> Tensor:
    """Permute the rows of a query or key weight [heads * E, D] from pairs (i, i + E/2) to pairs (2i, 2i + 1)."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Backend, num_rows: int) -> None:
    """Add the tokenizer for a model whose embedding has `num_rows` rows, including spare rows."""
    tokenizer = fit_to_embedding(tokenizer, num_rows)  # llama.cpp rejects a model with more tokens than rows
    if tokenizer.is_llama_style:
        types = [_TOKEN_TYPES[kind] for _, kind in tokenizer.tokens]
        if tokenizer.unk_id is not None:
            types[tokenizer.unk_id] = TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        _add_tokens(writer, [text for text, _ in tokenizer.tokens], types, num_rows)
        writer.add_token_scores(tokenizer.scores() + [0.0] * (num_rows - tokenizer.vocab_size))
        writer.add_add_space_prefix(True)  # implied by `is_llama_style`
        writer.add_remove_extra_whitespaces(False)
    else:
        converted = tokenizer.converted
        # In a byte-level tokenizer, only added tokens that are not special have the type `text`.
        kinds = {**_TOKEN_TYPES, "byte-level": TokenType.NORMAL, "text": TokenType.USER_DEFINED}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(converted))
        texts, types = [text for text, _ in converted.tokens], [kinds[kind] for _, kind in converted.tokens]
        _add_tokens(writer, texts, types, num_rows)
        writer.add_token_merges([" ".join(merge) for merge in converted.merges()])
    for number, add in (
        (tokenizer.bos_id, writer.add_bos_token_id),
        (tokenizer.eos_id, writer.add_eos_token_id),
        (tokenizer.unk_id, writer.add_unk_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(bool(tokenizer.bos_prefix))
    writer.add_add_eos_token(False)


def _add_tokens(writer: gguf.GGUFWriter, texts: list[str], types: list[TokenType], num_rows: int) -> None:
    """Add the text and type of every token id; an id without a token gets a placeholder that no text is encoded to."""
    num_spare = num_rows - len(texts)
    texts = [text or f"[PAD{number}]" for number, text in enumerate([*texts, *[""] * num_spare])]
    writer.add_token_list(texts)
    writer.add_token_types([*types, *[TokenType.UNUSED] * num_spare])
