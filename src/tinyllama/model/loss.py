"""The output head and the next-token cross-entropy in one function, which keeps the logits of only one chunk in memory.

The logits are by far the largest tensor of a training step. In float32, the logits, their softmax and their gradient
would take more memory than the weights. `linear_cross_entropy` computes the logits and their gradient for one chunk of
tokens at a time.

Shapes: N tokens, D model, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from tinyllama.model.flops import CPU_SOFTMAX_CHUNK, loss_chunk_tokens

_FP16_CHUNK_TOKENS = 8192
"""Maximum number of tokens of a chunk in float16. The head's gradient is a sum over these tokens, and no loss scale
could prevent its overflow in a larger chunk of a small vocabulary."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    cast_weight: Tensor | None = None,
    token_nats: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of targets int64[N] in nats, summed over N, for hidden[N, D] and head weight[V, D].

    The gradient, but not the returned value, includes `z_loss` times the sum of log(Z)^2, where Z is the softmax's
    denominator (Chowdhery et al. 2022, arXiv:2204.02311, section 5). Matrix products are computed in the dtype of
    `hidden`, and sums in float32. `cast_weight` is `weight` in the dtype of `hidden`, if the caller has it already. If
    given, `token_nats` float32[N] is filled with the cross-entropy of each token, without a gradient.
    """
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    nats: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, z_loss, with_gradient, cast_weight, token_nats
    )
    return nats


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        with_gradient: bool,
        cast_weight: Tensor | None,
        token_nats: Tensor | None,
    ) -> Tensor:
        matrix = weight.to(hidden.dtype) if cast_weight is None else cast_weight
        if token_nats is None:
            token_nats = hidden.new_empty(len(hidden), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = hidden.new_empty(0)
        is_cpu = hidden.device.type == "cpu"
        tokens = loss_chunk_tokens(len(weight), is_cpu)
        if hidden.dtype == torch.float16:
            tokens = min(tokens, _FP16_CHUNK_TOKENS)
        softmax_tokens = max(1, CPU_SOFTMAX_CHUNK // len(weight)) if is_cpu else tokens
        for start in range(0, len(hidden), tokens):
            chunk = slice(start, start + tokens)
            logits = hidden[chunk] @ matrix.T
            parts = (tensor.split(softmax_tokens) for tensor in (logits, targets[chunk], token_nats[chunk]))
            for part, part_targets, part_nats in zip(*parts, strict=True):
                part_nats.copy_(_loss_and_gradient_inplace(part, part_targets, z_loss))
            if with_gradient:
                torch.mm(logits, matrix, out=hidden_gradient[chunk])
                product = logits.T @ hidden[chunk]
                weight_gradient = weight_gradient.add_(product) if start else product.float()
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return token_nats.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        # Multiply in place, to avoid a second copy of the weight's gradient, which is as large as the weight.
        gradients = hidden_gradient.mul_(gradient), weight_gradient.mul_(gradient).to(ctx.weight_dtype)
        return *gradients, None, None, None, None, None


def _loss_and_gradient_inplace(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Replace logits[N, V] by their gradient and return the nats of each token, float32[N]."""
    targets = targets[:, None]
    target_logits = logits.gather(-1, targets).float()
    # The highest probability never underflows, so the logarithm of the softmax's denominator follows from it.
    if logits.is_cpu:  # where `max` with indices would take as long as the softmax
        wide = logits.float()
        highest = wide.amax(-1, keepdim=True)
        probabilities = torch.softmax(wide, -1, out=wide)
        highest_probability = probabilities.amax(-1, keepdim=True)
    else:
        probabilities = torch.softmax(logits, -1, dtype=torch.float32)
        highest, token = logits.max(-1, keepdim=True)  # bf16 logits are half as large as float32 probabilities
        highest_probability = probabilities.gather(-1, token)
    log_z = highest.float() - highest_probability.log()
    if z_loss:
        probabilities *= 1 + 2 * z_loss * log_z
    probabilities.scatter_add_(-1, targets, probabilities.new_full(targets.shape, -1.0))
    logits.copy_(probabilities)
    return (log_z - target_logits).squeeze(1)
