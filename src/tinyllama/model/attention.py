"""Causal attention with grouped heads: the fused kernels on a GPU, products of blocks on a CPU.

torch's flash attention runs at 80 GF/s on two CPU cores, where matrix products run at 800; the same written as products
of blocks of queries with the keys up to each block's end takes less than half its time.

Shapes: B batch, H query heads, K key/value heads, T time, E width of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK_QUERIES = 128
"""Queries a block: fewer make the products smaller and slower, more multiply keys that none of them may see."""


def causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Each query's mixture of the values at its position and before it.

    query[B, H, T, E], keys[B, K, T, E], values[B, K, T, E] -> [B, H, T, E].
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    return _in_blocks(query, keys, values)


def _in_blocks(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same as products of blocks; the heads of a group are rows of one product with their common keys."""
    batch, heads, time, width = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    rows = query.unflatten(1, (kv_heads, group)).transpose(2, 3).reshape(batch * kv_heads, time * group, width)
    rows = rows * width**-0.5
    keys, values = keys.reshape(batch * kv_heads, time, width), values.reshape(batch * kv_heads, time, width)
    mixed = []
    for start in range(0, time, _BLOCK_QUERIES):
        end = min(start + _BLOCK_QUERIES, time)
        scores = torch.bmm(rows[:, start * group : end * group], keys[:, :end].mT)
        position = torch.arange(start * group, end * group, device=query.device) // group
        seen = torch.arange(end, device=query.device) <= position[:, None]
        weights = torch.softmax(scores.float().masked_fill(~seen, -torch.inf), -1).to(query.dtype)
        mixed.append(torch.bmm(weights, values[:, :end]))
    out = torch.cat(mixed, 1).view(batch, kv_heads, time, group, width).transpose(2, 3)
    return out.reshape(batch, heads, time, width)
