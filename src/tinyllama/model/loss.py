"""The output head and the cross-entropy of next tokens in one step, without ever holding all logits.

The logits of a batch are the biggest tensor of a training step by far: in float32 they, their softmax and their
gradient would take more memory than the weights. Here they exist for one chunk of tokens at a time, and the gradients
are computed while they do.

Shapes: N tokens, D model, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from tinyllama.model.flops import CPU_SOFTMAX_CHUNK, LOGITS_CHUNK


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Nats to predict targets int64[N] from hidden[N, D] through the head weight[V, D], summed over N, in float32.

    The gradient is also that of `z_loss` times the sum of log(Z)^2, Z being the softmax's denominator (Chowdhery et al.
    2022, arXiv:2204.02311, section 5), which the value leaves out. Products are in hidden's dtype, sums in float32.
    """
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    nats: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, with_gradient)  # type: ignore[no-untyped-call]
    return nats


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, with_gradient: bool
    ) -> Tensor:
        matrix = weight.to(hidden.dtype)
        nats = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if with_gradient else hidden.new_empty(0)
        tokens, cached = (max(1, most // len(weight)) for most in (LOGITS_CHUNK, CPU_SOFTMAX_CHUNK))
        cached = cached if hidden.device.type == "cpu" else tokens
        for start in range(0, len(hidden), tokens):
            chunk = slice(start, start + tokens)
            logits = hidden[chunk] @ matrix.T
            for rows, wanted in zip(logits.split(cached), targets[chunk].split(cached), strict=True):
                nats += _loss_and_grad_inplace(rows, wanted, z_loss)
            if with_gradient:
                torch.mm(logits, matrix, out=hidden_gradient[chunk])
                weight_gradient += logits.T @ hidden[chunk]
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        # In place, so that the weight's gradient, as large as the weight, exists once.
        return hidden_gradient.mul_(gradient), weight_gradient.mul_(gradient).to(ctx.weight_dtype), None, None, None


def _loss_and_grad_inplace(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Replace logits[N, V] by the gradient of their loss; return the nats, summed over N."""
    targets = targets[:, None]
    target_logits = logits.gather(-1, targets).float()
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    likeliest, token = probabilities.max(-1, keepdim=True)
    log_z = logits.gather(-1, token).float() - likeliest.log()  # of the likeliest, whose probability never underflows
    if z_loss:
        probabilities *= 1 + 2 * z_loss * log_z
    probabilities.scatter_add_(-1, targets, probabilities.new_full(targets.shape, -1.0))
    logits.copy_(probabilities)
    return (log_z - target_logits).sum()
