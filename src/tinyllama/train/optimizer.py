"""AdamW over float32 master weights, and the norm that clips the gradient."""

import torch
from torch import Tensor, nn

from tinyllama.recipe import Optimizer


def build_optimizer(model: nn.Module, recipe: Optimizer) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), decaying matrices and embeddings, not norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradient(model: nn.Module, largest_norm: float) -> Tensor:
    """Scale the gradient down to a global norm of `largest_norm` at most; return the norm it had, over all ranks."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
