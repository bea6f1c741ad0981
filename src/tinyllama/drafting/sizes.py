"""Sizes for a recipe: vocabulary, model, tokens, batch and validation, from the amount of text and of computation.

The model is the one with the lowest loss by the fit of Hoffmann et al. (2022, arXiv:2203.15556, approach 3), which is
about 20 tokens per parameter for large models and fewer for small ones. A text is read at most 4 times, since further
repetitions help less and less (Muennighoff et al. 2023, arXiv:2305.16264).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinyllama.model.flops import flops_per_token, num_parameters
from tinyllama.recipe import Model

MAX_EPOCHS = 4
_MIN_TOKENS_PER_PARAMETER = 1
"""Limit for small texts: the fit has no term for overfitting."""
MIN_HELD_OUT_DOCUMENTS = 10
"""Expected number of held-out documents below which the end of each document is held out instead."""
_VOCABULARIES = ((0, 512), (250e3, 1024), (1e6, 2048), (10e6, 4096), (100e6, 8192), (500e6, 16384), (4e9, 32000))
"""Bytes of text from which a vocabulary size is used; docs/own-data.md has the same table."""
_SMALL_VOCABULARIES = (288, 320, 384)
"""Vocabulary sizes for texts with few different words, such as logs. 259 tokens are special tokens and bytes."""
_VALIDATION_BYTES = 500_000
_MIN_VALIDATION_FRACTION, _MAX_VALIDATION_FRACTION = 0.005, 0.1
_STEPS = 800
"""Number of steps that the batch size aims at; batches of large models are limited by _MAX_BATCH_TOKENS."""
_MAX_BATCH_TOKENS = 1 << 19
_MIN_BATCH_SEQUENCES = 4
_MIN_SEQUENCE_LENGTH = 64


@dataclass(frozen=True)
class Shape:
    """A model of the ladder, with its peak learning rate."""

    model: Model
    learning_rate: float


def _shape(dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, length: int, rate: float) -> Shape:
    model = Model(
        dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, ffn_dim=ffn_dim, context_length=length,
        tie_embeddings=dim < 768,
    )  # fmt: skip
    return Shape(model, rate)


SHAPES = (
    _shape(64, 2, 2, 1, 192, 256, 5e-3),
    _shape(128, 4, 4, 2, 352, 256, 4e-3),
    _shape(192, 6, 6, 2, 512, 256, 3e-3),
    _shape(256, 6, 4, 2, 704, 256, 3e-3),  # the demo's shape
    _shape(384, 8, 6, 2, 1024, 512, 2e-3),
    _shape(512, 12, 8, 4, 1408, 1024, 1e-3),
    _shape(768, 12, 12, 4, 2048, 2048, 6e-4),  # tinyllama-120m
    _shape(1024, 20, 16, 4, 2816, 2048, 5e-4),
    _shape(2048, 22, 32, 4, 5632, 2048, 4e-4),  # tinyllama-1.1b
)
"""The ladder of models, the smallest first, with the learning rates of the bundled recipes and values between them."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that a recipe has, except the vocabulary size."""

    shape: Shape
    tokens: int
    batch_sequences: int
    epochs: float
    """Number of times that the run reads the text."""
    is_limited_by_text: bool
    """Whether the text, and not the time, limits the number of tokens."""

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return -(-self.tokens // (self.batch_sequences * self.shape.model.context_length))


def vocabulary_for(text_bytes: float) -> int:
    """Return the vocabulary size for an amount of text: 2,048 from 1 MB on, 8,192 from 100 MB on."""
    return next(size for least, size in reversed(_VOCABULARIES) if text_bytes >= least)


def vocabulary_candidates(preferred: int) -> list[int]:
    """Return the sizes to try on the text: the preferred one, then smaller ones, then larger ones."""
    sizes = [*_SMALL_VOCABULARIES, *(size for _, size in _VOCABULARIES)]
    place = sizes.index(preferred)
    return [*reversed(sizes[: place + 1]), *sizes[place + 1 :]]


def validation_fraction_for(text_bytes: float) -> float:
    """Return the fraction of the text to hold out: about 500 kB, but at least 0.5 % and at most 10 % of the text."""
    fraction = _VALIDATION_BYTES / max(1.0, text_bytes)
    return float(f"{min(_MAX_VALIDATION_FRACTION, max(_MIN_VALIDATION_FRACTION, fraction)):.1g}")


def predicted_loss(parameters: float, tokens: float) -> float:
    """Return the loss in nats per token by the fit of Hoffmann et al. (2022), equation 10."""
    return 1.69 + 406.4 * math.pow(parameters, -0.34) + 410.7 * math.pow(tokens, -0.28)


def choose_sizes(
    flops: float,
    vocab_size: int,
    unique_tokens: float,
    shortest_validation: float = math.inf,
    shapes: Sequence[Shape] = SHAPES,
) -> Sizes:
    """Return the sizes with the lowest predicted loss for a number of FLOPs and an amount of text in tokens.

    Only models of `shapes` with at least one token per parameter are compared, or the smallest model. See `sizes_of`
    for `shortest_validation`.
    """
    choices = [sizes_of(shape, flops, vocab_size, unique_tokens, shortest_validation) for shape in shapes]
    sizes = {num_parameters(choice.shape.model, vocab_size): choice for choice in choices}
    allowed = [count for count, one in sizes.items() if one.tokens >= _MIN_TOKENS_PER_PARAMETER * count]
    return sizes[min(allowed or [min(sizes)], key=lambda count: predicted_loss(count, sizes[count].tokens))]


def sizes_of(
    shape: Shape, flops: float, vocab_size: int, unique_tokens: float, shortest_validation: float = math.inf
) -> Sizes:
    """Return the sizes of a run with a given shape.

    `shortest_validation` is the smallest number of held-out tokens of a source. It limits the context length, so that
    each source has a sequence for validation.
    """
    length = shape.model.context_length
    while length > max(_MIN_SEQUENCE_LENGTH, shortest_validation):
        length //= 2
    model = shape.model.model_copy(update={"context_length": length})
    affordable = flops / flops_per_token(model, vocab_size, length)
    tokens = min(affordable, MAX_EPOCHS * unique_tokens)
    batch_tokens = min(_MAX_BATCH_TOKENS, tokens / _STEPS)
    sequences = max(_MIN_BATCH_SEQUENCES, 2 ** round(math.log2(max(1.0, batch_tokens / length))))
    rounded = round_down(max(tokens, sequences * length))
    return Sizes(Shape(model, shape.learning_rate), rounded, sequences, rounded / unique_tokens, tokens < affordable)


def round_down(count: float) -> int:
    """Return a count with two significant digits, rounded down."""
    unit = 10 ** max(0, math.floor(math.log10(max(1.0, count))) - 1)
    return int(count // unit * unit)
