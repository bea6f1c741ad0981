"""Causal attention with grouped heads: torch's fused kernels on a GPU, products of blocks on a CPU.

torch's own kernel runs at a seventh of a matrix product's speed on a CPU. There a block of queries meets all keys up
to its last in one product, in which the query heads that share a key/value head are so many more rows; hardly more than
the visible half of all scores is ever computed. It is an operator of its own, since torch.compile gains nothing on
these products and would unroll them block by block.

Shapes: B batch, H query heads, K key/value heads, T time, E width of a head.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.model.flops import ATTENTION_BLOCK, saved_attention_probabilities


def causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Each query's mixture of the values at its position and before it.

    query[B, H, T, E], keys[B, K, T, E], values[B, K, T, E] -> [B, H, T, E].
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    mixed: Tensor = _forward(query, keys, values)[0]
    return mixed


@torch.library.custom_op("tinyllama::causal_attention", mutates_args=())
def _forward(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The attention; and the probabilities, block after block, or none of them."""
    mixed, kept = _forward_fake(query, keys, values)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    for start, end, room in _blocks(query, keys, kept):
        probabilities = _probabilities(_rows(query, keys, start, end), keys[:, :end], start, out=room)
        block = mixed[:, :, start:end]
        block.copy_(torch.bmm(probabilities, values[:, :end]).view(block.shape))
    return mixed, kept


@torch.library.custom_op("tinyllama::causal_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, query: Tensor, keys: Tensor, values: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, keys and values."""
    query_gradient, key_gradient, value_gradient = _backward_fake(gradient, query, keys, values, kept)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    # In float32, since every block adds to them, and transposed, since a product that has to transpose probabilities
    # is slow.
    key_sum, value_sum = torch.zeros(2, *keys.mT.shape, device=keys.device)
    for start, end, room in _blocks(query, keys, kept):
        rows, upstream = _rows(query, keys, start, end), _rows(gradient, keys, start, end)
        probabilities = room if len(kept) else _probabilities(rows, keys[:, :end], start, out=room)
        value_sum[..., :end] += torch.bmm(upstream.mT, probabilities)
        score_gradient = torch.bmm(upstream, values[:, :end].mT)
        score_gradient = torch._softmax_backward_data(score_gradient, probabilities, -1, score_gradient.dtype)
        key_sum[..., :end] += torch.bmm(rows.mT, score_gradient)
        block = query_gradient[:, :, start:end]
        block.copy_(torch.bmm(score_gradient, keys[:, :end]).view(block.shape))
    scale = query.shape[-1] ** -0.5
    query_gradient *= scale
    key_gradient.flatten(0, 1).copy_(key_sum.mT).mul_(scale)
    value_gradient.flatten(0, 1).copy_(value_sum.mT)
    return query_gradient, key_gradient, value_gradient


def _blocks(query: Tensor, keys: Tensor, kept: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """First and last position of each block of queries, and room for its probabilities [B K, rows, keys]."""
    taken = 0
    for start in range(0, query.shape[2], ATTENTION_BLOCK):
        end = min(start + ATTENTION_BLOCK, query.shape[2])
        shape = (len(keys), query.shape[0] * query.shape[1] // len(keys) * (end - start), end)
        if len(kept):
            room = kept[taken : taken + math.prod(shape)].view(shape)
            taken += room.numel()
        else:
            room = query.new_empty(shape)
        yield start, end, room


def _rows(x: Tensor, keys: Tensor, start: int, end: int) -> Tensor:
    """x[B, H, start:end, E], the heads of one of the keys[B K, T, E] below each other: [B K, rows, E]."""
    return x[:, :, start:end].reshape(len(keys), -1, x.shape[-1])


def _probabilities(rows: Tensor, keys: Tensor, start: int, out: Tensor) -> Tensor:
    """softmax(rows keys^T / sqrt(E)) in `out`; rows[B K, rows, E] are the queries of keys[B K, end, E] from `start`."""
    torch.bmm(rows * rows.shape[-1] ** -0.5, keys.mT, out=out)
    block = out.shape[2] - start
    later = out.new_full((block, block), -torch.inf).triu_(1)
    out.unflatten(1, (-1, block))[..., start:] += later
    return torch.softmax(out, -1, out=out)


def _empty(x: Tensor) -> Tensor:
    """An empty [B, H, T, E] that lies as [B, T, H, E] in memory, as the layers before and after have it."""
    batch, heads, time, width = x.shape
    return x.new_empty(batch, time, heads, width).transpose(1, 2)


@_forward.register_fake
def _forward_fake(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, time, _ = query.shape
    return _empty(query), query.new_empty(batch * heads * saved_attention_probabilities(time))


@_backward.register_fake
def _backward_fake(
    gradient: Tensor, query: Tensor, keys: Tensor, values: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(gradient, *ctx.saved_tensors)
    return gradients


_forward.register_autograd(_differentiate, setup_context=_setup_context)

CPU_ATTENTION = torch.ops.tinyllama.causal_attention.default
"""The operator as a dispatcher sees it."""
