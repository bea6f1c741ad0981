"""Attention in blocks is attention: values and gradients are those of torch's own, at any length and head ratio."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.model import attention
from tinyllama.model.attention import causal_attention

SIZES = [(1, 1, 1, 1), (2, 4, 4, 7), (2, 6, 2, 128), (1, 8, 1, 129), (3, 4, 2, 300), (1, 4, 2, 513), (1, 2, 2, 640)]


def drawn(batch: int, heads: int, kv_heads: int, time: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, keys and values as a layer lays them out, heads beside each other."""
    random = torch.Generator().manual_seed(time)
    counts = (heads, kv_heads, kv_heads)
    return [
        torch.randn(batch, time, count, 32, generator=random).to(dtype).transpose(1, 2).requires_grad_()
        for count in counts
    ]


def outcome(attend: object, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    assert callable(attend)
    mixed = attend(*inputs)
    return [mixed.detach(), *torch.autograd.grad(mixed, inputs, upstream.to(mixed.dtype))]


def plain(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "time"), SIZES)
def test_values_and_gradients_are_torchs_own(batch: int, heads: int, kv_heads: int, time: int) -> None:
    inputs = drawn(batch, heads, kv_heads, time, torch.float32)
    upstream = torch.randn(batch, heads, time, 32, generator=torch.Generator().manual_seed(1))
    ours, theirs = outcome(causal_attention, inputs, upstream), outcome(plain, inputs, upstream)
    for found, wanted in zip(ours, theirs, strict=True):
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 2e-5


@pytest.mark.parametrize("time", [300, 640])
def test_in_bf16_they_are_about_as_near_to_float32s_as_torchs_are(time: int) -> None:
    inputs = drawn(2, 6, 2, time, torch.bfloat16)
    upstream = torch.randn(2, 6, time, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = outcome(plain, [value.detach().float().requires_grad_() for value in inputs], upstream)
    ours, theirs = outcome(causal_attention, inputs, upstream), outcome(plain, inputs, upstream)
    for found, peer, wanted in zip(ours, theirs, exact, strict=True):
        error, its_error = ((value.float() - wanted).norm() for value in (found, peer))
        assert error < 2.5 * its_error + 1e-3 * wanted.norm()  # scores are rounded to bf16 before the softmax here


@pytest.mark.parametrize("time", [200, 600])
def test_the_operator_keeps_what_torch_asks_of_one(time: int) -> None:
    torch.library.opcheck(attention._forward, tuple(drawn(1, 4, 2, time, torch.float32)))
