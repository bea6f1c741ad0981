"""Activation checkpointing: computing activations again in the backward pass, to hold less memory between the two."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tinyllama.model.attention import CPU_ATTENTION

# Under torch.compile it would warn, in five lines, of operations in place in what is computed again; a block has none.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in record.getMessage())

Recompute = Literal["none", "selective", "full"]

_aten = torch.ops.aten
# What `selective` keeps, since it costs most to compute again: products of matrices, and attention that is one call.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    CPU_ATTENTION,
}


def checkpointed(how: Recompute, layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`layer(*arguments)`, of which the backward pass computes again what `how` says.

    `none` keeps all activations, `full` only the arguments (Chen et al. 2016, arXiv:1604.06174), `selective` also the
    results of matrix products and of attention (Korthikanti et al. 2022, arXiv:2205.05198).
    """
    if how == "none" or not torch.is_grad_enabled():
        return layer(*arguments)
    contexts: dict[str, Any] = {}
    if how == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False, **contexts)
    return result


def _policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
