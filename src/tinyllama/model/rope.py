"""The rotary position embedding (Su et al. 2021, arXiv:2104.09864) with the scalings of its frequencies.

Shapes: B batch, T time, E width of a head.
"""

import math

import torch
from torch import Tensor

from tinyllama.recipe import Model


def rope_frequencies(config: Model, device: torch.device | None = None) -> Tensor:
    """Return the frequency of each pair of a head's dimensions in radians per token, float32[E/2], after the scaling.

    On a CPU, the frequencies equal those of Hugging Face's `modeling_rope_utils` to the last bit. `llama3` is the
    scaling of Llama 3.1 (`apply_scaling` in meta-llama/llama-models).
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context_length
    assert low is not None and high is not None and original is not None
    rotations = original / (2 * math.pi / frequencies)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rope_table(config: Model, length: int, start: int = 0, device: torch.device | None = None) -> Tensor:
    """Return the cosines and sines of `length` positions from `start` on, float32[2, length, E/2]."""
    positions = torch.arange(start, start + length, device=device).float()
    angles = torch.outer(positions, rope_frequencies(config, device))
    return torch.stack((angles.cos(), angles.sin()))


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x[B, heads, T, E] by rope[2, T, E/2]; dimensions i and i + E/2 form a pair, as in Hugging Face."""
    cos, sin = rope[0], rope[1]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
