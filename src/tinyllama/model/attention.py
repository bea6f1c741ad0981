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
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from tinyllama.model.flops import ATTENTION_BLOCK, saved_attention_probabilities

INFERENCE_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""torch's attention kernels for inputs whose shapes change often. cuDNN's kernel is excluded, because cuDNN needs up to
half a second to plan each new shape."""


def causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention output [B, H, T, E] for query[B, H, T, E], keys[B, K, T, E] and values[B, K, T, E]."""
    if query.device.type != "cpu":
        return _fused_attention(query, keys, values)
    output: Tensor = _forward(query, keys, values, None)[0]
    return output


def document_attention(query: Tensor, keys: Tensor, values: Tensor, document_starts: Tensor) -> Tensor:
    """Return the output of `causal_attention` within documents; document_starts int[B, T] are those of a batch."""
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
def _forward(query: Tensor, keys: Tensor, values: Tensor, document_starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the attention output and the probabilities of each block (empty if the backward pass recomputes them)."""
    output, saved = _forward_fake(query, keys, values, document_starts)
    tensors = (output, query, keys.contiguous(), values.contiguous())
    for part, saved_part in _parts(tensors, saved, document_starts):
        _forward_part(*part, saved_part)
    return output, saved


def _forward_part(output: Tensor, query: Tensor, keys: Tensor, values: Tensor, saved: Tensor) -> None:
    """Write the attention output and the probabilities to `output` and `saved`."""
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    for start, end, buffer in _blocks(query, keys, saved):
        probabilities = _probabilities(_rows(query, keys, start, end), keys[:, :end], start, out=buffer)
        block = output[:, :, start:end]
        block.copy_(torch.bmm(probabilities, values[:, :end]).view(block.shape))


@torch.library.custom_op("tinyllama::causal_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, query: Tensor, keys: Tensor, values: Tensor, document_starts: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, keys and values."""
    gradients = _backward_fake(gradient, query, keys, values, document_starts, saved)
    tensors = (*gradients, gradient, query, keys.contiguous(), values.contiguous())
    for part, saved_part in _parts(tensors, saved, document_starts):
        _backward_part(*part, saved_part)
    return gradients


def _backward_part(
    query_gradient: Tensor,
    key_gradient: Tensor,
    value_gradient: Tensor,
    gradient: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    saved: Tensor,
) -> None:
    """Write the gradients of query, keys and values to the first three tensors."""
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    # The sums over the blocks are float32, so that rounding errors stay small. The sums are transposed, since a matrix
    # product is slow if it transposes the probabilities.
    key_sum, value_sum = torch.zeros(2, *keys.mT.shape, device=keys.device)
    for start, end, buffer in _blocks(query, keys, saved):
        rows, upstream = _rows(query, keys, start, end), _rows(gradient, keys, start, end)
        probabilities = buffer if len(saved) else _probabilities(rows, keys[:, :end], start, out=buffer)
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


def _parts(
    tensors: Sequence[Tensor], saved: Tensor, document_starts: Tensor | None
) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
    """Yield views of the tensors [B, heads, T, E] for each document of each sequence, and the document's part of `saved`.

    The probabilities of a sequence's documents need at most as many elements as those of an undivided sequence.
    """
    if document_starts is None:
        yield tensors, saved
        return
    used, (_, heads, time, _) = 0, tensors[0].shape
    is_first = document_starts == torch.arange(time)
    for begin, after in pairwise([*is_first.flatten().nonzero().flatten().tolist(), is_first.numel()]):
        row, start = divmod(begin, time)
        end = start + after - begin
        size = heads * saved_attention_probabilities(end - start) if len(saved) else 0
        yield [tensor[row : row + 1, :, start:end] for tensor in tensors], saved[used : used + size]
        used += size


def _blocks(query: Tensor, keys: Tensor, saved: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield each block's start, its end (exclusive), and the buffer for its probabilities [B K, R, end]."""
    used = 0
    for start in range(0, query.shape[2], ATTENTION_BLOCK):
        end = min(start + ATTENTION_BLOCK, query.shape[2])
        shape = (len(keys), query.shape[0] * query.shape[1] // len(keys) * (end - start), end)
        if len(saved):
            buffer = saved[used : used + math.prod(shape)].view(shape)
            used += buffer.numel()
        else:
            buffer = query.new_empty(shape)
        yield start, end, buffer


def _rows(x: Tensor, keys: Tensor, start: int, end: int) -> Tensor:
    """Return x[B, H, start:end, E] as rows [B K, R, E], with the heads that share a key/value head stacked."""
    return x[:, :, start:end].reshape(len(keys), -1, x.shape[-1])


def _probabilities(rows: Tensor, keys: Tensor, start: int, out: Tensor) -> Tensor:
    """Write softmax(rows keys^T / sqrt(E)) to out[B K, R, end]; rows[B K, R, E] are queries from position `start`."""
    torch.bmm(rows * rows.shape[-1] ** -0.5, keys.mT, out=out)
    block = out.shape[2] - start
    mask = out.new_full((block, block), -torch.inf).triu_(1)
    out.unflatten(1, (-1, block))[..., start:] += mask
    return torch.softmax(out, -1, out=out)


def _empty(x: Tensor) -> Tensor:
    """Return an uninitialized tensor [B, H, T, E] in the memory layout [B, T, H, E], which the adjacent layers use."""
    batch, heads, time, width = x.shape
    return x.new_empty(batch, time, heads, width).transpose(1, 2)


@_forward.register_fake
def _forward_fake(query: Tensor, keys: Tensor, values: Tensor, document_starts: Tensor | None) -> tuple[Tensor, Tensor]:
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
