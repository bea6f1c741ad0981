"""Attention within documents: no token of a sequence attends to the documents before its own.

A CPU runs the operator of `attention`, which computes each document alone. A GPU runs torch's flex_attention, which
skips blocks of scores without common documents. Positions need not restart with each document, since rotary embeddings
depend only on the distance between two tokens.

Shapes: B batch, T time, H query heads, K key/value heads, E width of a head.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tinyllama import hardware
from tinyllama.model.attention import document_attention


class DocumentMask:
    """Replacement for a layer's causal attention; all layers share the mask of a forward pass."""

    def __init__(self, document_starts: Tensor) -> None:
        """Prepare the mask; document_starts int32[B, T] has the index of the first token of each token's document."""
        self.document_starts = document_starts
        self.blocks = block_mask(document_starts) if _has_flex_attention(document_starts.device) else None

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output [B, H, T, E] for query[B, H, T, E], keys[B, K, T, E] and values[B, K, T, E]."""
        if self.blocks is None:
            return document_attention(query, keys, values, self.document_starts)
        return block_attention(query, keys, values, self.blocks)


def block_mask(document_starts: Tensor) -> BlockMask:
    """Return the mask of document_starts int32[B, T] for `block_attention`."""

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= document_starts[row, query])

    (batch, time), device = document_starts.shape, document_starts.device
    found: BlockMask = _compiled(create_block_mask, device)(is_visible, batch, None, time, time, device=device)
    return found


def block_attention(query: Tensor, keys: Tensor, values: Tensor, blocks: BlockMask) -> Tensor:
    """Return the attention output [B, H, T, E] for query[B, H, T, E], keys[B, K, T, E] and values[B, K, T, E]."""
    # a compiled layer contains the kernel; without compilation, flex_attention would store T x T scores
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention, query.device)
    output: Tensor = attend(query, keys, values, block_mask=blocks, enable_gqa=query.shape[1] != keys.shape[1])
    return output


def _has_flex_attention(device: torch.device) -> bool:
    return device.type != "cpu"  # flex_attention has no backward pass for CPUs


@cache
def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if hardware.can_compile(device) else function
