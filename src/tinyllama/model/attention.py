"""Causal attention with grouped key/value heads: torch's fused kernels on a GPU, blocked matrix products on a CPU.

torch's attention kernel for CPUs reaches one seventh of the FLOP/s of a matrix product. On a CPU, this module therefore
multiplies each block of queries with all keys up to the block's last token in one matrix product. Query heads that
share a key/value head are stacked as rows of this product. Only a few masked scores, those inside the block, are
computed. CPU attention is a custom operator, because torch.compile would unroll the loop over the blocks without making
the matrix products faster. With a document mask, each document of a sequence is computed alone, so no score between two
documents is computed.

Shapes: B batch, T time, H query heads, K key/value heads, E width of a head, R rows of a block of queries (number of
queries x H / K).
"""

import math
from collections.abc import Iterator
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from tinyllama.model.flops import ATTENTION_BLOCK, saved_attention_probabilities

INFERENCE_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""torch's attention kernels for inputs whose shapes change often. cuDNN's kernel is excluded, because cuDNN needs up to
half a second to plan each new shape."""

_DOCUMENT_PADDING = 32
"""Multiple to which the numbers of queries and keys of a document are padded. A matrix product of a new shape takes
0.3 ms longer, because oneDNN first compiles its code."""


def causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention output [B, H, T, E] for query[B, H, T, E], keys[B, K, T, E] and values[B, K, T, E]."""
    if query.device.type != "cpu":
        return _fused_attention(query, keys, values)
    output: Tensor = _forward(query, keys, values)[0]
    return output


def document_attention(query: Tensor, keys: Tensor, values: Tensor, document_starts: Tensor) -> Tensor:
    """Return the output of `causal_attention` within documents.

    document_starts int32[B, T] has the index of the first token of each token's document.
    """
    output: Tensor = _forward(query, keys, values, document_starts)[0]
    return output


def _fused_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Compute causal attention with torch's fused kernels.

    The flash kernel, which supports grouped heads, needs bf16, or fp16 on Ampere or newer. The memory-efficient kernel
    supports grouped heads only from torch 2.14 on (pytorch pull request 191085). Before that, torch would silently
    store T x T scores. Except for bf16, each head of a group therefore gets its own copy of the keys and values.
    """
    copies = query.shape[1] // keys.shape[1]
    if query.dtype != torch.bfloat16 and copies > 1:
        keys, values = keys.repeat_interleave(copies, 1), values.repeat_interleave(copies, 1)
    return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)


@torch.library.custom_op("tinyllama::causal_attention", mutates_args=())
def _forward(
    query: Tensor, keys: Tensor, values: Tensor, document_starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the attention output and the probabilities that the backward pass does not recompute."""
    output, saved = _forward_fake(query, keys, values, document_starts)
    keys, values = _padded(keys, document_starts), _padded(values, document_starts)
    for rows, block, used, buffer, _ in _blocks(query, keys, saved, document_starts):
        probabilities = _probabilities(_stacked(query, keys, rows, block, used), keys[rows, :, used], out=buffer)
        _write(output, rows, block, torch.bmm(probabilities, values[rows, :, used].flatten(0, 1)))
    return output, saved


@torch.library.custom_op("tinyllama::causal_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, query: Tensor, keys: Tensor, values: Tensor, document_starts: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, keys and values."""
    query_gradient, key_gradient, value_gradient = _backward_fake(gradient, query, keys, values, document_starts, saved)
    keys, values = _padded(keys, document_starts), _padded(values, document_starts)
    # The sums over the blocks are float32, so that rounding errors stay small. The sums are transposed, since a matrix
    # product is slow if it transposes the probabilities.
    key_sum, value_sum = torch.zeros(2, *keys.mT.shape, device=keys.device)
    for rows, block, used, buffer, is_saved in _blocks(query, keys, saved, document_starts):
        queries, upstream = (_stacked(x, keys, rows, block, used) for x in (query, gradient))
        probabilities = buffer if is_saved else _probabilities(queries, keys[rows, :, used], out=buffer)
        value_sum[rows, ..., used].flatten(0, 1).add_(torch.bmm(upstream.mT, probabilities))
        score_gradient = torch.bmm(upstream, values[rows, :, used].flatten(0, 1).mT)
        score_gradient = torch._softmax_backward_data(score_gradient, probabilities, -1, score_gradient.dtype)
        key_sum[rows, ..., used].flatten(0, 1).add_(torch.bmm(queries.mT, score_gradient))
        _write(query_gradient, rows, block, torch.bmm(score_gradient, keys[rows, :, used].flatten(0, 1)))
    scale, time = query.shape[-1] ** -0.5, query.shape[2]
    query_gradient *= scale
    key_gradient.copy_(key_sum[..., :time].mT).mul_(scale)
    value_gradient.copy_(value_sum[..., :time].mT)
    return query_gradient, key_gradient, value_gradient


def _blocks(
    query: Tensor, keys: Tensor, saved: Tensor, document_starts: Tensor | None
) -> Iterator[tuple[slice, slice, slice, Tensor, bool]]:
    """Yield the sequences, queries and keys of each block, a buffer, and whether `saved` contains this buffer.

    The buffer is for the probabilities [N K, R, keys] of N sequences. With documents, the numbers of queries and keys
    are padded to a multiple of `_DOCUMENT_PADDING`. The added keys are masked, since they are after all queries.
    """
    offset, (batch, heads, time, _), kv_heads = 0, query.shape, keys.shape[1]
    for rows, first, stop in _documents(document_starts, batch, time):
        for start in range(first, stop, ATTENTION_BLOCK):
            end = min(start + ATTENTION_BLOCK, stop)
            padding = 0 if document_starts is None else (start - end) % _DOCUMENT_PADDING
            num_rows = heads // kv_heads * (end + padding - start)
            shape = ((rows.stop - rows.start) * kv_heads, num_rows, end + padding - first)
            after = offset + math.prod(shape)
            is_saved = after <= len(saved)
            buffer = saved[offset:after].view(shape) if is_saved else query.new_empty(shape)
            offset = after if is_saved else offset
            yield rows, slice(start, end), slice(first, end + padding), buffer, is_saved


def _documents(document_starts: Tensor | None, batch: int, time: int) -> Iterator[tuple[slice, int, int]]:
    """Yield the sequences, the first token and the end (exclusive) of tokens that attend only to one another."""
    if document_starts is None:
        yield slice(0, batch), 0, time
        return
    edges = [[*sorted(set(starts)), time] for starts in document_starts.tolist()]
    for own_edges, group in groupby(range(batch), edges.__getitem__):  # such as adjacent undivided sequences
        rows = [*group]
        for first, stop in pairwise(own_edges):
            yield slice(rows[0], rows[-1] + 1), first, stop


def _padded(x: Tensor, document_starts: Tensor | None) -> Tensor:
    """Return x[B, K, T, E] contiguously, with zeros after the last token for the padding of documents."""
    return x.contiguous() if document_starts is None else F.pad(x, (0, 0, 0, _DOCUMENT_PADDING - 1))


def _stacked(x: Tensor, keys: Tensor, rows: slice, block: slice, used: slice) -> Tensor:
    """Return a block of x[B, H, T, E] as [N K, R, E], with the heads that share a key/value head stacked.

    Zeros pad the queries, so that they end at the last one of the keys `used`.
    """
    part = x[rows, :, block]
    if used.stop > block.stop:
        part = F.pad(part, (0, 0, 0, used.stop - block.stop))
    return part.reshape(len(part) * keys.shape[1], -1, x.shape[-1])


def _write(x: Tensor, rows: slice, block: slice, products: Tensor) -> None:
    """Write products[N K, R, E] to a block of x[B, H, T, E], without those of the padding."""
    part = x[rows, :, block]
    part.copy_(products.view(*part.shape[:2], -1, part.shape[3])[:, :, : part.shape[2]])


def _probabilities(queries: Tensor, keys: Tensor, out: Tensor) -> Tensor:
    """Write softmax(queries keys^T / sqrt(E)) to out[N K, R, keys]; queries[N K, R, E] are those of the last keys."""
    torch.bmm(queries * queries.shape[-1] ** -0.5, keys.flatten(0, 1).mT, out=out)
    block = (out.shape[2] - 1) % ATTENTION_BLOCK + 1
    out.unflatten(1, (-1, block))[..., -block:] += _causal_mask(block, out.dtype)
    return torch.softmax(out, -1, out=out)


@cache
def _causal_mask(size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size, size), -torch.inf, dtype=dtype, device="cpu").triu_(1)


def _empty(x: Tensor) -> Tensor:
    """Return an uninitialized tensor [B, H, T, E] in the memory layout [B, T, H, E], which the adjacent layers use."""
    batch, heads, time, width = x.shape
    return x.new_empty(batch, time, heads, width).transpose(1, 2)


@_forward.register_fake
def _forward_fake(
    query: Tensor, keys: Tensor, values: Tensor, document_starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, heads, time, _ = query.shape
    return _empty(query), query.new_empty(batch * heads * saved_attention_probabilities(time))


@_backward.register_fake
def _backward_fake(
    gradient: Tensor, query: Tensor, keys: Tensor, values: Tensor, document_starts: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(gradient, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_setup_context)

CPU_ATTENTION = torch.ops.tinyllama.causal_attention.default
"""The operator of causal attention, for policies of activation checkpointing."""
