"""Optimizers over float32 master weights, and gradient clipping."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tinyllama.model.llama import Llama
from tinyllama.recipe import Optimizer


def build_optimizers(model: Llama, recipe: Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a model; each parameter belongs to exactly one optimizer.

    `adamw` is AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) for all parameters. Weight decay applies to matrices
    and embeddings but not to norms. `muon` is Muon (Jordan et al. 2024; torch.optim.Muon) for the matrices of the
    blocks, and AdamW for all other parameters. Muon treats fused matrices (query, key and value; gate and up) as one
    matrix. Muon's steps are scaled to the root mean square of AdamW's steps, so that both optimizers use the same
    learning rate and weight decay (Liu et al. 2025, arXiv:2502.16982).
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim > 1] if recipe.name == "muon" else []
    ids_of_matrices = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in ids_of_matrices]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
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
    """Run one step of each optimizer with this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradient to a global norm of `max_norm`; return the norm over all ranks before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
