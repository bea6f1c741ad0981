"""Time, memory and error of the output head's loss on a GPU, for benchmarks/gpu.py: ours, torch's and Liger's.

The shape is that of a micro-batch of the 1.1B model: 16,384 tokens x 2,048 x 32,000, in bf16, forward and backward. The
weight is float32, and each variant includes its cast to bf16. The reference is torch's cross-entropy in float32.
"""

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gpu_correctness import TOLERANCES, largest, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.errors import summarize_error
from tinyllama.model import loss
from tinyllama.model.flops import LOGITS_CHUNK, loss_chunk_tokens
from tinyllama.plan.measure import time_call

ROUNDS = 5
SHAPE, TINY_SHAPE = (16_384, 2_048, 32_000), (256, 64, 512)
"""Tokens, model dimension and vocabulary size."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Variant(NamedTuple):
    """A loss that is measured."""

    build: Callable[[], Loss | None]
    """Function that returns the loss, or None if it is not installed. The loss is the sum of the nats for hidden
    bf16[N, D], weight float32[V, D], targets."""
    setting: AbstractContextManager[object] = nullcontext()
    is_ours: bool = False


def head_loss(device: str) -> Iterator[dict[str, Any]]:
    """Yield milliseconds, memory and errors of each variant."""
    tokens, dim, vocab_size = SHAPE if device == "cuda" else TINY_SHAPE
    torch.manual_seed(1)
    hidden = torch.randn(tokens, dim, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab_size, dim, device=device) * dim**-0.5).bfloat16().float().requires_grad_()
    targets = torch.randint(vocab_size, (tokens,), device=device)
    reference = compute(lambda h, w, t: F.cross_entropy(h.float() @ w.T, t, reduction="sum"), hidden, weight, targets)
    chunks = (loss_chunk_tokens(vocab_size, is_cpu=False), LOGITS_CHUNK // vocab_size)
    for name, variant in variants(chunks if device == "cuda" else (128, 32)).items():
        row: dict[str, Any] = {"loss": name}
        gc.collect()
        try:
            call = variant.build()
            if call is None:
                yield row | {"note": "not installed"}
                continue
            with variant.setting:
                row |= measure(call, hidden, weight, targets, reference)
        except Exception as error:  # a variant that this machine does not support must not end the others
            yield row | {"note": summarize_error(error)} | ({"passed": False} if variant.is_ours else {})
            continue
        tolerance = TOLERANCES[torch.bfloat16]
        has_passed = largest((row["error of the loss"], row["error of the gradients"])) < tolerance
        yield row | ({"passed": has_passed} if variant.is_ours else {})


def variants(chunks: tuple[int, int]) -> dict[str, Variant]:
    """Return the variants by name; `chunks` are the chunk sizes in tokens, first that of training on a GPU."""
    found: dict[str, Variant] = {}

    def ours() -> Loss:
        return loss.linear_cross_entropy

    for chunk in chunks:
        setting = patch.object(loss, "loss_chunk_tokens", lambda *_, chunk=chunk: chunk)
        found[f"tinyllama, chunks of {chunk} tokens"] = Variant(ours, setting, True)
    compiled = torch.compile(pointwise_loss_and_gradient_inplace, dynamic=False)
    setting = patch.object(loss, "_loss_and_gradient_inplace", compiled)
    found["tinyllama, compiled softmax"] = Variant(ours, setting, True)
    found["torch, its own chunks"] = Variant(partial(torch_loss, {}))
    options = {"batch_chunk_size": chunks[0], "chunking_method": None}
    found[f"torch, chunks of {chunks[0]} tokens"] = Variant(partial(torch_loss, options))
    found["Liger"] = Variant(liger_loss)
    return found


def pointwise_loss_and_gradient_inplace(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Do what `loss._loss_and_gradient_inplace` does, with operations that torch.compile fuses into one kernel."""
    values = logits.float()
    log_z = values.logsumexp(-1, keepdim=True)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    target_logits = logits.gather(-1, targets[:, None]).float()
    logits.copy_((values - log_z).exp() * (1 + 2 * z_loss * log_z) - is_target.float())
    return (log_z - target_logits).squeeze(1)


def torch_loss(options: dict[str, Any]) -> Loss | None:
    """Return torch's chunked loss with these fields of LinearCrossEntropyOptions, if this torch has it (2.13)."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        return None
    chosen = nn.LinearCrossEntropyOptions(**options)
    return lambda hidden, weight, targets: F.linear_cross_entropy(
        hidden, weight.to(hidden.dtype), targets, reduction="sum", options=chosen
    )


def liger_loss() -> Loss | None:
    """Return Liger's loss, whose chunks have as many logits as the hidden states have elements, if it is installed."""
    if find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # noqa: PLC0415

    function = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, targets: function(weight.to(hidden.dtype), hidden, targets)


def measure(call: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, reference: list[Tensor]) -> dict[str, Any]:
    """Return the median time, the memory above that of the inputs and gradients, and the errors of one variant."""
    outcome = compute(call, hidden, weight, targets)  # compiles
    errors = [relative_error(found, expected) for found, expected in zip(outcome, reference, strict=True)]
    del outcome
    memory = None
    if hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    milliseconds = 1e3 * statistics.median(
        time_call(lambda: compute(call, hidden, weight, targets)) for _ in range(ROUNDS)
    )
    if hidden.is_cuda:
        memory = (torch.cuda.max_memory_allocated() - before) / 1e9
    return {
        "ms": milliseconds,
        "peak GB": memory,
        "error of the loss": errors[0],
        "error of the gradients": largest(errors[1:]),
    }


def compute(call: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Return the loss and the gradients of the hidden states and the weight, in float32."""
    nats = call(hidden, weight, targets)
    gradients = torch.autograd.grad(nats, (hidden, weight))
    return [tensor.detach().float() for tensor in (nats, *gradients)]
