"""The update rules over float32 master weights, and the norm that clips the gradient."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tinyllama.model.llama import Llama
from tinyllama.recipe import Optimizer


def build_optimizers(model: Llama, recipe: Optimizer) -> list[torch.optim.Optimizer]:
    """The optimisers of a model, each over parameters of its own.

    `adamw`: AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) over everything, decaying matrices and embeddings, not
    norms. `muon`: Muon (Jordan et al. 2024; torch.optim.Muon) over the blocks' matrices, as they are stacked (query,
    key and value are one, gate and up are one), its updates scaled to AdamW's mean square so that both share learning
    rate and decay (Liu et al. 2025, arXiv:2502.16982); AdamW over the rest.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim > 1] if recipe.name == "muon" else []
    muons = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in muons]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adamw]


def optimizer_step(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Update every parameter once."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()


def zero_grad(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Drop all gradients."""
    for optimizer in optimizers:
        optimizer.zero_grad()


def clip_grad_norm(model: nn.Module, largest_norm: float) -> Tensor:
    """Scale the gradient down to a global norm of `largest_norm` at most; return the norm it had, over all ranks."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
