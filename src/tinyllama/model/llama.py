"""The Llama network, for training, evaluation and generation, without access to files.

Weights are float32 (or the dtype of the loaded weights) and are cast to the activations' dtype at each use, so
gradients are accumulated in float32. Query, key and value are one projection; gate and up are another projection.

Shapes: B batch, T time, D model, H query heads, K key/value heads, E width of a head, F feed-forward, V vocabulary.
"""

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tinyllama.errors import InputError
from tinyllama.model.attention import CPU_ATTENTION, causal_attention
from tinyllama.model.document_mask import DocumentMask
from tinyllama.model.flops import LLAMA_2_VOCAB_SIZE
from tinyllama.model.loss import linear_cross_entropy
from tinyllama.model.rope import apply_rope, rope_table
from tinyllama.model.weights import load_parameters
from tinyllama.recipe import ActivationCheckpointing, Model

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_SAVED_OPERATIONS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.higher_order.flex_attention,
    CPU_ATTENTION,
}
"""Operations whose results `selective` activation checkpointing keeps, since their recomputation takes longest."""

# Suppress torch.compile's warning about in-place operations in checkpointed regions: a block has no such operations.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in record.getMessage())


class Linear(nn.Linear):
    """Linear layer without bias, whose weight is cast to the activations' dtype at each use."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: x[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize: x[..., D] -> [..., D]."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


class AttentionOverride(Protocol):
    """Replacement for a layer's causal attention, such as a KV cache or a document mask."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output [B, H, T, E] for query[B, H, T, E] and the new keys and values [B, K, T, E]."""


@dataclass
class KVCache:
    """KV cache of one layer: keys and values [B, K, capacity, E], of which `length` positions are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append keys and values [B, K, T, E] and return the attention of query[B, H, T, E] to all cached positions."""
        start, end = self.length, self.length + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.length = end
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        if start == 0:
            return causal_attention(query, keys, values)
        visible = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, enable_gqa=True)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.qkv = Linear(config.dim, (config.heads + 2 * config.kv_heads) * config.head_dim)
        self.out = Linear(config.heads * config.head_dim, config.dim)

    def forward(self, x: Tensor, rope: Tensor, override: AttentionOverride | None = None) -> Tensor:
        """Attend: x[B, T, D], rope[2, T, E/2] -> [B, T, D]."""
        batch, time, _ = x.shape
        heads = self.qkv(x).view(batch, time, -1, self.head_dim).transpose(1, 2)
        query, keys, values = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        query, keys = apply_rope(query, rope), apply_rope(keys, rope)
        attended = (override.attend if override else causal_attention)(query, keys, values)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU feed-forward network: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gate_up = Linear(config.dim, 2 * config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward network: x[B, T, D] -> [B, T, D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """One layer: attention and feed-forward. Each follows a norm, and its output is added to the residual stream.

    `activation_checkpointing` selects the activations that are kept for the backward pass, which recomputes the others.
    `none` keeps all activations. `full` keeps only the block's input (Chen et al. 2016, arXiv:1604.06174). `selective`
    keeps the input and the results of matrix products and of attention (Korthikanti et al. 2022, arXiv:2205.05198).
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rope: Tensor, override: AttentionOverride | None = None) -> Tensor:
        """Apply the block: x[B, T, D], rope[2, T, E/2] -> [B, T, D]."""
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self._forward(x, rope, override)
        options: dict[str, Any] = {}
        if self.activation_checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _checkpoint_policy)
        out: Tensor = checkpoint(
            self._forward, x, rope, override, use_reentrant=False, preserve_rng_state=False, **options
        )
        return out

    def _forward(self, x: Tensor, rope: Tensor, override: AttentionOverride | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, override)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


def _checkpoint_policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _SAVED_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE


class Llama(nn.Module):
    """The network with its embedding and output head; `precision` is the dtype of activations and logits."""

    def __init__(
        self, config: Model, vocab_size: int = LLAMA_2_VOCAB_SIZE, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.dim, vocab_size)
        self._cast_head: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """Vocabulary size, V."""
        return self.embedding.num_embeddings

    @property
    def num_parameters(self) -> int:
        """Number of parameters, over all ranks; a tied head adds none."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding.weight.device

    def __repr__(self) -> str:
        shape = f"{self.config.layers} layers of width {self.config.dim}, {self.vocab_size:,} tokens"
        return f"Llama({self.num_parameters:,} parameters: {shape}; {self.precision} on {self.device})"

    @property
    def head_weight(self) -> Tensor:
        """Output head [V, D]."""
        return self.embedding.weight if self.head is None else self.head.weight

    def set_activation_checkpointing(self, mode: ActivationCheckpointing) -> None:
        """Set which activations every block keeps for the backward pass; see `Block`."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.activation_checkpointing = mode

    @contextmanager
    def cast_weights_once(self) -> Iterator[None]:
        """Cast the weight matrices to the compute precision now, instead of at each use, until the block ends.

        The weights must not change in the block. Backward passes add the gradients to those of the float32 weights.
        The copies exist only in the block and are not in the state dict of the model afterwards.
        """
        linears = [module for module in self.blocks.modules() if isinstance(module, Linear)]
        weights = [linear.weight for linear in linears]
        try:
            self._cast_head = self.head_weight.detach().to(self.precision)
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight = nn.Parameter(weight.detach().to(self.precision))
                linear.weight.register_post_accumulate_grad_hook(partial(_move_gradient, weight))
            yield
        finally:
            self._cast_head = None
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight = weight

    def hidden_states(
        self, ids: Tensor, caches: list[KVCache] | None = None, document_starts: Tensor | None = None
    ) -> Tensor:
        """Return the normalized residual stream [B, T, D] for ids int64[B, T], which follow the tokens in `caches`.

        `document_starts` int32[B, T], which excludes `caches`, has the index of the first token of each token's
        document. No token then attends to the tokens before this index.
        """
        start = caches[0].length if caches else 0
        rope = rope_table(self.config, ids.shape[1], start, ids.device)
        x = self.embedding(ids).to(self.precision)
        mask = None if document_starts is None else DocumentMask(document_starts)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, caches[layer] if caches else mask)
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head: hidden[..., D] -> [..., V]."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype))

    def forward(
        self, ids: Tensor, caches: list[KVCache] | None = None, document_starts: Tensor | None = None
    ) -> Tensor:
        """Return logits [B, T, V] for ids int64[B, T]; see `hidden_states` for `caches` and `document_starts`.

        Raises InputError if `ids` has another type or shape, or if the cached tokens and `ids` exceed the context. On
        the CPU, also raises InputError if an id is outside the vocabulary.
        """
        if not torch.compiler.is_compiling():  # the values are unknown, and a limit would restrict the compiled shapes
            check_ids(ids, self.vocab_size, self.config.context_length, caches[0].length if caches else 0)
        return self.logits(self.hidden_states(ids, caches, document_starts))

    def next_logits(self, ids: Tensor, caches: list[KVCache]) -> Tensor:
        """Return the logits [B, V] of the token after ids int64[B, T], which follow the cached tokens."""
        return self.logits(self.hidden_states(ids, caches)[:, -1])

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        z_loss: float = 0.0,
        token_nats: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """Return the summed cross-entropy in nats of targets given ids, both int64[B, T].

        `linear_cross_entropy` explains `z_loss` and `token_nats`, here float32[B T]; `hidden_states` explains
        `document_starts`. If `ids` has more rows than `targets`, the extra rows at the end of `ids` are ignored.
        """
        hidden = self.hidden_states(ids, None, document_starts)[: len(targets)].flatten(0, 1)
        return linear_cross_entropy(hidden, self.head_weight, targets.flatten(), z_loss, self._cast_head, token_nats)

    def new_caches(self, batch: int, capacity: int) -> list[KVCache]:
        """Return one empty cache per layer, for `batch` sequences of up to `capacity` tokens."""
        size = (batch, self.config.kv_heads, capacity, self.config.head_dim)
        empty = partial(torch.empty, size, dtype=self.precision, device=self.device)
        return [KVCache(empty(), empty()) for _ in self.blocks]


def check_ids(ids: object, vocab_size: int, context_length: int, cached: int = 0) -> None:
    """Raise InputError if `ids` cannot be the input of a model; see `Llama.forward`."""
    if not isinstance(ids, Tensor):
        raise InputError(f"ids: a {type(ids).__name__}; give a tensor [batch, time], such as torch.tensor([[1, 2, 3]])")
    if ids.ndim != 2:
        raise InputError(f"ids: a tensor of shape {list(ids.shape)}; give [batch, time], such as ids[None]")
    if ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"ids: a tensor of {ids.dtype}; give integers, such as ids.long()")
    if cached + ids.shape[1] > context_length:
        before = f" after {cached} cached tokens" if cached else ""
        raise InputError(f"ids: {ids.shape[1]} tokens{before}, but the model's context is {context_length}; give fewer")
    # a comparison on a GPU would wait for the GPU; a subclass such as FakeTensor has no values
    if type(ids) is Tensor and ids.device.type == "cpu" and ids.numel():
        beyond = next((number for number in (int(ids.min()), int(ids.max())) if not 0 <= number < vocab_size), None)
        if beyond is not None:
            problem = f"the id {beyond} is not in the vocabulary of {vocab_size:,} tokens"
            raise InputError(f"ids: {problem}; encode the text with the model's own tokenizer")


def _move_gradient(weight: Tensor, copy: Tensor) -> None:
    """Add the gradient of a weight's copy to the gradient of the weight, and remove it from the copy."""
    assert copy.grad is not None
    weight.grad = copy.grad.to(weight.dtype) if weight.grad is None else weight.grad.add_(copy.grad)
    copy.grad = None


def initialize(model: Llama, seed: int) -> None:
    """Initialize a model's parameters in place, with the distributions of the original TinyLlama.

    The weights of norms are one. The elements of a matrix are normally distributed. Their standard deviation is
    sqrt(2 / (5 D)) (Nguyen and Salazar 2019, arXiv:1910.05895), except in a matrix that writes to the residual stream.
    There, it is 1 / (sqrt(D) layers). Each matrix has its own random stream. The values of a matrix therefore depend on
    the seed and on the name of the matrix, but not on the device or the number of ranks.
    """
    load_parameters(model, _initial_values(model, seed))


def _initial_values(model: Llama, seed: int) -> Iterator[tuple[str, Tensor]]:
    dim, layers = model.config.dim, model.config.layers
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            yield name, torch.ones(parameter.shape)
            continue
        writes_residual = name.endswith(("attention.out.weight", "ffn.down.weight"))
        std = 1 / (math.sqrt(dim) * layers) if writes_residual else math.sqrt(2 / (5 * dim))
        key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
        yield name, torch.randn(parameter.shape, generator=torch.Generator().manual_seed(key)).mul_(std)
