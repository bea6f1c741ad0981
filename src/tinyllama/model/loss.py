"""The output head and the cross-entropy as one, a chunk of tokens at a time, so that logits never exist whole."""

from typing import Any

import torch
from torch import Tensor

_CHUNK_TOKENS = 1024


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        compute = weight.to(hidden.dtype)
        needs = any(ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(hidden) if needs else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs else None
        nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), _CHUNK_TOKENS):
            part, wanted = hidden[start : start + _CHUNK_TOKENS], targets[start : start + _CHUNK_TOKENS]
            logits = (part @ compute.T).float()
            total = logits.logsumexp(-1, keepdim=True)
            nats += (total - logits.gather(-1, wanted[:, None])).sum()
            if needs:
                gradient = torch.softmax(logits, -1)
                if z_loss:
                    gradient.mul_(1 + 2 * z_loss * total)
                gradient[torch.arange(len(part), device=part.device), wanted] -= 1
                gradient = gradient.to(hidden.dtype)
                torch.mm(gradient, compute, out=hidden_gradient[start : start + _CHUNK_TOKENS])
                weight_gradient += gradient.T @ part
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            hidden_gradient * gradient.to(hidden_gradient.dtype),
            (weight_gradient * gradient).to(ctx.weight_dtype),
            None,
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Nats to predict targets int64[N] from hidden[N, D] through the head weight[V, D], summed over N.

    The gradient is also that of `z_loss` times the sum of the logits' squared log-sum (Chowdhery et al. 2022,
    arXiv:2204.02311, section 5), which the value leaves out.
    """
    nats: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, z_loss)
    return nats
