"""What a recipe will need: counts of parameters and operations, by closed formulas, no torch."""

from tinyllama.recipe import Model


def num_parameters(shape: Model, vocab_size: int) -> int:
    """Parameters of the network; the model card's shape with 32,000 pieces has 1,100,048,384."""
    attention = shape.dim * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    block = attention + 3 * shape.dim * shape.ffn_dim + 2 * shape.dim
    embeddings = vocab_size * shape.dim * (1 if shape.tie_embeddings else 2)
    return embeddings + shape.layers * block + shape.dim


def flops_per_token(shape: Model, vocab_size: int, sequence_length: int) -> int:
    """Operations to train on one token, forward and backward, that an MFU counts.

    6 x (parameters less the input embedding, which is looked up) + 6 x layers x dim x sequence_length: causal
    attention, which needs half of the products of full attention (Chowdhery et al. 2022, arXiv:2204.02311, appendix B,
    counts the full one). By it the model card's 24k tokens/s are 52.0 % of an A100's 312 TFLOP/s.
    """
    untied = shape.model_copy(update={"tie_embeddings": False})
    multiplied = num_parameters(untied, vocab_size) - vocab_size * shape.dim
    return 6 * multiplied + 6 * shape.layers * shape.dim * sequence_length
