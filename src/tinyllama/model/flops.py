"""Counts of parameters and operations, by closed formulas."""

from tinyllama.recipe import Model

LLAMA_2_PIECES = 32_000
"""To plan with where a recipe's tokenizer is not here yet."""


def parameters_by_part(shape: Model, vocab_size: int) -> dict[str, int]:
    """Parameters of the network by what they belong to; the head has none of its own where embeddings are tied."""
    embedding = vocab_size * shape.dim
    return {
        "embedding": embedding,
        "attention": shape.layers * shape.dim * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads),
        "feed_forward": shape.layers * 3 * shape.dim * shape.ffn_dim,
        "norms": (2 * shape.layers + 1) * shape.dim,
        "head": 0 if shape.tie_embeddings else embedding,
    }


def num_parameters(shape: Model, vocab_size: int) -> int:
    """Parameters of the network; the model card's shape with 32,000 pieces has 1,100,048,384."""
    return sum(parameters_by_part(shape, vocab_size).values())


def flops_per_token(shape: Model, vocab_size: int, sequence_length: int) -> int:
    """Operations to train on one token, forward and backward, that an MFU counts.

    6 x (parameters less the input embedding, which is looked up) + 6 x layers x dim x sequence_length: causal
    attention, which needs half of the products of full attention (Chowdhery et al. 2022, arXiv:2204.02311, appendix B,
    counts the full one). By it the model card's 24k tokens/s are 52.0 % of an A100's 312 TFLOP/s.
    """
    return 6 * _multiplied(shape, vocab_size) + 6 * shape.layers * shape.dim * sequence_length


def flops_by_formula(shape: Model, vocab_size: int, sequence_length: int) -> dict[str, int]:
    """Operations a token by the formulas in use, so that an MFU from elsewhere can be compared.

    `causal` is `flops_per_token`, which every MFU here is stated in; `full` counts all of attention's products; `6N`
    and `6N+full` count the input embedding too, `6N` no attention.
    """
    parameters, attention = num_parameters(shape, vocab_size), 12 * shape.layers * shape.dim * sequence_length
    return {
        "causal": flops_per_token(shape, vocab_size, sequence_length),
        "full": 6 * _multiplied(shape, vocab_size) + attention,
        "6N": 6 * parameters,
        "6N+full": 6 * parameters + attention,
    }


def _multiplied(shape: Model, vocab_size: int) -> int:
    """Parameters that a token is multiplied with: all but the input embedding; a tied head is multiplied too."""
    parts = parameters_by_part(shape, vocab_size)
    return sum(parts.values()) - parts["head"]
