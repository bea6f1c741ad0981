"""Closed formulas for the network's parameters, FLOPs and buffer sizes. `plan` uses them without loading torch."""

from tinyllama.recipe import Model

LLAMA_2_VOCAB_SIZE = 32_000
"""Assumed vocabulary size if a recipe's tokenizer does not exist yet."""
LOGITS_CHUNK = 2**25
"""Maximum number of logits in memory at a time on a CPU; smaller chunks make matrix products slower."""
GPU_LOGITS_CHUNK = 2**27
"""Maximum number of logits in memory at a time on a GPU. Each chunk reads and writes the head's float32 gradient."""
CPU_SOFTMAX_CHUNK = 2**20
"""Maximum number of float32 probabilities in memory at a time on a CPU; that many fit into the CPU's cache."""
MUON_BATCH_ELEMENTS = 2**26
"""Maximum number of elements per rank that Muon orthogonalizes together; larger batches need more temporary memory."""
ATTENTION_BLOCK = 128
"""Queries per block of attention on a CPU. Small blocks make matrix products slow; large blocks compute more masked
scores."""
MAX_SAVED_SEQUENCE_LENGTH = 512
"""Maximum sequence length for which the CPU's attention saves its probabilities. For longer sequences, the backward
pass recomputes the probabilities."""

STEP_MEMORY_FRACTION = 0.1
"""Maximum fraction of a device's memory for weights and gradients that exist only during a step."""


def keeps_weights(
    parameters: int, element_bytes: int, micro_batches: int, is_sharded: bool, memory_bytes: float
) -> bool:
    """Return whether a step keeps all weights in the compute precision over its micro-batches, which takes memory.

    A rank of several then gathers the weights once per step, and accumulates unsharded float32 gradients that it
    reduces once per step: `element_bytes` + 4 bytes per parameter. A single process then casts its float32 weights
    once per step: `element_bytes` per parameter. `memory_bytes` is the memory of the rank's device.
    """
    bytes_per_parameter = element_bytes + (4 if is_sharded else 0)
    saves_work = micro_batches > 1 and (is_sharded or element_bytes < 4)
    return saves_work and bytes_per_parameter * parameters <= STEP_MEMORY_FRACTION * memory_bytes


def parameters_by_part(config: Model, vocab_size: int) -> dict[str, int]:
    """Return the number of parameters of each part of the network; a tied head adds no parameters."""
    embedding = vocab_size * config.dim
    return {
        "embedding": embedding,
        "attention": config.layers * config.dim * config.head_dim * (2 * config.heads + 2 * config.kv_heads),
        "feed_forward": config.layers * 3 * config.dim * config.ffn_dim,
        "norms": (2 * config.layers + 1) * config.dim,
        "head": 0 if config.tie_embeddings else embedding,
    }


def num_parameters(config: Model, vocab_size: int) -> int:
    """Return the number of parameters: 1,100,048,384 for the TinyLlama model card's configuration (32,000 tokens)."""
    return sum(parameters_by_part(config, vocab_size).values())


def flops_per_token(config: Model, vocab_size: int, sequence_length: int) -> int:
    """Return the FLOPs per trained token, forward and backward, for the computation of MFU.

    The formula is 6 x (parameters without the input embedding, which is a lookup) + 6 x layers x heads x
    head_dim x sequence_length. The second term is for causal attention, which has half of the FLOPs of full attention
    in Chowdhery et al. (2022, arXiv:2204.02311, appendix B). It is the same with `train.document_mask`. By this
    formula, the model card's 24k tokens/s are 52.0 % of an A100's 312 TFLOP/s.
    """
    parts = parameters_by_part(config, vocab_size)
    multiplied = sum(parts.values()) - parts["head"]  # the output head counts even if it is tied
    return 6 * multiplied + 6 * config.layers * config.heads * config.head_dim * sequence_length


def loss_chunk_tokens(vocab_size: int, is_cpu: bool) -> int:
    """Return the maximum number of tokens whose logits the loss computes at a time.

    On a GPU, the number is a multiple of 128 where the vocabulary allows it, so that matrix products use full tiles.
    """
    if is_cpu:
        return max(1, LOGITS_CHUNK // vocab_size)
    tokens = max(1, GPU_LOGITS_CHUNK // vocab_size)
    return tokens - tokens % 128 or tokens


def saved_attention_probabilities(sequence_length: int) -> int:
    """Return the number of probabilities that attention on a CPU saves per query head and sequence.

    A block of queries saves its probabilities over all keys up to the block's last token.
    """
    if sequence_length > MAX_SAVED_SEQUENCE_LENGTH:
        return 0
    starts = range(0, sequence_length, ATTENTION_BLOCK)
    ends = [min(start + ATTENTION_BLOCK, sequence_length) for start in starts]
    return sum((end - start) * end for start, end in zip(starts, ends, strict=True))
