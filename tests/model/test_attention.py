"""The CPU's blocked attention has the values and gradients of torch's attention, for any length and head ratio."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.model import attention
from tinyllama.model.attention import causal_attention

SIZES = [(1, 1, 1, 1), (2, 4, 4, 7), (2, 6, 2, 128), (1, 8, 1, 129), (3, 4, 2, 300), (1, 4, 2, 513), (1, 2, 2, 640)]


def random_inputs(batch: int, heads: int, kv_heads: int, time: int, dtype: torch.dtype) -> list[Tensor]:
    """Return query, keys and values with the memory layout of a layer, [B, T, heads, E]."""
    random = torch.Generator().manual_seed(time)
    return [
        torch.randn(batch, time, count, 32, generator=random).to(dtype).transpose(1, 2).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def output_and_gradients(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    output = attend(*inputs)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def torch_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "time"), SIZES)
def test_values_and_gradients_equal_torch(batch: int, heads: int, kv_heads: int, time: int) -> None:
    inputs = random_inputs(batch, heads, kv_heads, time, torch.float32)
    ours, theirs = (output_and_gradients(attend, inputs) for attend in (causal_attention, torch_attention))
    for found, expected in zip(ours, theirs, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("time", [300, 640])
def test_bf16_error_is_similar_to_torch(time: int) -> None:
    inputs = random_inputs(2, 6, 2, time, torch.bfloat16)
    exact = output_and_gradients(torch_attention, [value.detach().float().requires_grad_() for value in inputs])
    ours, theirs = (output_and_gradients(attend, inputs) for attend in (causal_attention, torch_attention))
    for found, peer, expected in zip(ours, theirs, exact, strict=True):
        error, peer_error = ((value.float() - expected).norm() for value in (found, peer))
        assert error < 2.5 * peer_error + 1e-3 * expected.norm()  # ours rounds scores to bf16 before the softmax


@pytest.mark.parametrize(
    ("dtype", "kv_heads"), [(torch.bfloat16, 2), (torch.float16, 6), (torch.float32, 6)]
)  # kv_heads in torch's kernel
def test_kernels_without_grouped_heads_get_equal_numbers_of_heads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kv_heads: int
) -> None:
    inputs = random_inputs(2, 6, 2, 40, dtype)
    expected = output_and_gradients(torch_attention, inputs)
    shapes, kernel = [], F.scaled_dot_product_attention

    def recorded(query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
        shapes.append((keys.shape[1], values.shape[1]))
        return kernel(query, keys, values, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    found = output_and_gradients(attention._fused_attention, inputs)
    assert shapes == [(kv_heads, kv_heads)]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < (2e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("time", [200, 600])
def test_operator_passes_opcheck(time: int) -> None:
    torch.library.opcheck(attention._forward, tuple(random_inputs(1, 4, 2, time, torch.float32)))
