"""The Llama 2 network, once: for training, scoring and generation.

Reads and writes nothing. Weights live in float32 (or whatever they were loaded as) and are cast to the dtype of the
activations where they are used, so gradients arrive and add up in float32; the query, key and value projections are
one product, and so are gate and up.

Shapes: B batch, T time, D model, H query heads, K key/value heads, E width of a head, F feed-forward, V vocabulary.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.model.activation_checkpointing import Recompute, checkpointed
from tinyllama.model.attention import causal_attention
from tinyllama.model.loss import linear_cross_entropy
from tinyllama.model.weights import load_parameters
from tinyllama.recipe import Model

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Linear(nn.Linear):
    """A matrix without bias, cast to the activations' dtype at use."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x[..., D] -> [..., D]."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


def rope_table(length: int, head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Cosines and sines of the rotary embedding, float32 [2, length, E/2] (Su et al. 2021, arXiv:2104.09864)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x[B, heads, T, E] by rope[2, T, E/2]; a pair is dimensions i and i + E/2, as Hugging Face stores it."""
    cos, sin = rope[0], rope[1]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class AttentionOverride(Protocol):
    """Which keys the queries of a layer meet, where that is more than those of their own rows up to themselves."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The attention of query[B, H, T, E], of the tokens whose keys and values [B, K, T, E] these are."""


@dataclass
class KVCache:
    """Keys and values [B, K, capacity, E] of one layer; `length` positions are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, K, T, E]; return all that are filled."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of tokens that follow those that are held, and are held from now on."""
        time = query.shape[2]
        keys, values = self.extend(keys, values)
        return (
            causal_attention(query, keys, values) if keys.shape[2] == time else _decode_attention(query, keys, values)
        )


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.qkv = Linear(shape.dim, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
        self.out = Linear(shape.dim, shape.dim)

    def forward(self, x: Tensor, rope: Tensor, reach: AttentionOverride | None = None) -> Tensor:
        """x[B, T, D], rope[2, T, E/2] -> [B, T, D]."""
        batch, time, dim = x.shape
        heads = self.qkv(x).view(batch, time, -1, self.head_dim).transpose(1, 2)
        query, keys, values = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        query, keys = apply_rope(query, rope), apply_rope(keys, rope)
        mixed = causal_attention(query, keys, values) if reach is None else reach.attend(query, keys, values)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, dim))
        return out


def _decode_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of queries [B, H, T, E] that are the last of the positions that keys and values cover."""
    time, total = query.shape[2], keys.shape[2]
    seen = torch.ones(time, total, dtype=torch.bool, device=query.device).tril(total - time)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)


class FeedForward(nn.Module):
    """SwiGLU: (silu(gate x) * up x) down (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.gate_up = Linear(shape.dim, 2 * shape.ffn_dim)
        self.down = Linear(shape.ffn_dim, shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x[B, T, D] -> [B, T, D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """One layer: attention and feed-forward, each after a norm and added to the residual stream.

    `recompute` says which activations the backward pass computes again instead of keeping them.
    """

    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        self.attention_norm = RMSNorm(shape.dim, shape.norm_eps)
        self.attention = Attention(shape)
        self.ffn_norm = RMSNorm(shape.dim, shape.norm_eps)
        self.ffn = FeedForward(shape)

    def forward(self, x: Tensor, rope: Tensor, reach: AttentionOverride | None = None) -> Tensor:
        """x[B, T, D], rope[2, T, E/2] -> [B, T, D]."""
        return checkpointed(self.recompute, self._layer, x, rope, reach)

    def _layer(self, x: Tensor, rope: Tensor, reach: AttentionOverride | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, reach)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class Llama(nn.Module):
    """The whole network, for Llama 2's 32,000 pieces unless told otherwise.

    `precision` is the dtype of the activations; logits come out in it too.
    """

    def __init__(self, shape: Model, vocab_size: int = 32_000, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.precision = shape, precision
        self.embedding = nn.Embedding(vocab_size, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.dim, shape.norm_eps)
        self.head = None if shape.tie_embeddings else Linear(shape.dim, vocab_size)

    @property
    def vocab_size(self) -> int:
        """Number of pieces, V."""
        return self.embedding.num_embeddings

    def hidden(self, ids: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """ids int64[B, T] -> the normed residual stream [B, T, D] that the head reads."""
        start = caches[0].length if caches else 0
        rope = rope_table(start + ids.shape[1], self.shape.head_dim, self.shape.rope_theta, ids.device)[:, start:]
        x = self.embedding(ids).to(self.precision)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, caches[layer] if caches else None)
        out: Tensor = self.norm(x)
        return out

    def set_activation_checkpointing(self, how: Recompute) -> None:
        """Choose which activations the backward pass computes again; see `checkpointed`."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute = how

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D]."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden[..., D] -> [..., V]."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype))

    def loss(self, ids: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
        """Nats to predict targets from ids, int64[B, T], summed; see `linear_cross_entropy` for `z_loss`.

        Targets may have fewer rows: then only so many rows of ids count.
        """
        hidden = self.hidden(ids)[: len(targets)].flatten(0, 1)
        return linear_cross_entropy(hidden, self.head_weight, targets.flatten(), z_loss)

    def forward(self, ids: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """ids int64[B, T] -> logits[B, T, V]; with caches, T continues what they hold."""
        return self.logits(self.hidden(ids, caches))

    def new_caches(self, batch: int, capacity: int) -> list[KVCache]:
        """Empty caches for `batch` rows of up to `capacity` tokens, one a layer."""
        size = (batch, self.shape.kv_heads, capacity, self.shape.head_dim)
        device = self.embedding.weight.device

        def empty() -> Tensor:
            return torch.empty(size, dtype=self.precision, device=device)

        return [KVCache(empty(), empty()) for _ in self.blocks]


def initial_weights(model: Llama, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Name and first value, float32 on the CPU, of each parameter of a model, as the original TinyLlama drew them.

    Norms are one. Matrices are normal with standard deviation sqrt(2 / (5 D)) (Nguyen and Salazar 2019,
    arXiv:1910.05895), and 1 / (sqrt(D) layers) where they write to the residual stream. Each has a stream of random
    numbers of its own, so its value depends on the seed and its name, not on the device or the number of ranks.
    """
    dim, layers = model.shape.dim, model.shape.layers
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            yield name, torch.ones(parameter.shape)
            continue
        writes_residual = name.endswith(("attention.out.weight", "ffn.down.weight"))
        std = 1 / (math.sqrt(dim) * layers) if writes_residual else math.sqrt(2 / (5 * dim))
        key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
        yield name, torch.randn(parameter.shape, generator=torch.Generator().manual_seed(key)).mul_(std)


def initialize(model: Llama, seed: int) -> None:
    """Give a model its `initial_weights`, in place."""
    load_parameters(model, initial_weights(model, seed))
