"""Closed formulas for the memory that training needs on one GPU, per component.

The formulas follow `model/` and FSDP2. The formulas count the activations that a block, eager or compiled, saves for
its backward pass. The formulas also count all tensors at each of the three moments at which the peak can occur.
tests/plan/test_memory.py compares the formulas with torch's FSDP2 memory tracker.
"""

from dataclasses import dataclass

from tinyllama.model.flops import (
    CPU_SOFTMAX_CHUNK,
    LOGITS_CHUNK,
    ActivationCheckpointing,
    num_parameters,
    parameters_by_part,
    saved_attention_probabilities,
)
from tinyllama.recipe import Model, Optimizer


@dataclass(frozen=True)
class Workload:
    """The work of one GPU: its model, micro-batch and shards."""

    model: Model
    vocab_size: int
    sequences: int
    """Number of sequences per micro-batch."""
    length: int
    """Number of tokens per sequence."""
    shards: int
    """Number of ranks among which the weights are sharded."""
    optimizer: Optimizer
    element_bytes: int = 2
    """Bytes per activation: 2 in bf16, 4 in fp32."""
    activation_checkpointing: ActivationCheckpointing = "none"
    compiled: bool = True
    is_cpu: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens per micro-batch."""
        return self.sequences * self.length

    @property
    def root_parameters(self) -> int:
        """Number of parameters of embedding, head and last norm, which FSDP keeps gathered from first to last use."""
        parts = parameters_by_part(self.model, self.vocab_size)
        return parts["embedding"] + parts["head"] + self.model.dim

    @property
    def block_parameters(self) -> int:
        """Number of parameters of one block."""
        return (num_parameters(self.model, self.vocab_size) - self.root_parameters) // self.model.layers

    @property
    def qkv_width(self) -> int:
        """Total width of queries, keys and values."""
        return (self.model.heads + 2 * self.model.kv_heads) * self.model.head_dim


def memory_by_component(workload: Workload) -> dict[str, int]:
    """Return the bytes of each component at the peak; their sum is the memory that one GPU needs.

    `logits` and `backward` never exist at the same time, so only the larger of them is included.
    """
    parameters = num_parameters(workload.model, workload.vocab_size)
    permanent = {
        "weights": 4 * parameters // workload.shards,
        "gradients": 4 * parameters // workload.shards,
        "optimizer": optimizer_bytes(workload) // workload.shards,
    }
    peaks = (_peak_at_loss(workload), _peak_in_backward(workload), _peak_at_gradient_reduction(workload))
    temporary = max(peaks, key=lambda components: sum(components.values()))
    return {name: round(count) for name, count in (permanent | temporary).items() if count}


def optimizer_bytes(workload: Workload) -> int:
    """Return the bytes of the float32 moments: two per parameter, or one for the matrices that Muon updates."""
    matrices = workload.model.layers * (workload.block_parameters - 2 * workload.model.dim)
    return 8 * num_parameters(workload.model, workload.vocab_size) - (
        4 * matrices if workload.optimizer.name == "muon" else 0
    )


def logits_bytes(workload: Workload) -> int:
    """Return the bytes of one chunk of the loss: logits, probabilities and the head's gradient."""
    logits = min(LOGITS_CHUNK, workload.tokens * workload.vocab_size)
    probabilities = min(logits, CPU_SOFTMAX_CHUNK) if workload.is_cpu else 2 * logits
    head = workload.vocab_size * workload.model.dim
    # unsharded float32 weights of the head are copied to bf16 for the matrix product
    cast_head = 0 if workload.shards > 1 or workload.element_bytes == 4 else head
    return workload.element_bytes * (logits + head + cast_head) + 4 * probabilities


def activation_bytes_per_token(workload: Workload) -> int:
    """Return the bytes that one block saves per token for its backward pass."""
    dim, wide = workload.model.dim, workload.model.ffn_dim
    match workload.activation_checkpointing:
        case "full":
            return workload.element_bytes * dim
        case "selective":
            products = (
                2 * dim + workload.qkv_width + 2 * wide + (0 if workload.compiled else dim)
            )  # eager mode also saves the output of the last matrix product
            return workload.element_bytes * (dim + products) + _saved_probabilities(workload)
        case "none":
            return _block_activation_bytes(workload) + _saved_probabilities(workload)


def _block_activation_bytes(workload: Workload) -> int:
    """Return the bytes per token that a block saves without activation checkpointing, probabilities excluded."""
    dim, wide, keys = workload.model.dim, workload.model.ffn_dim, workload.model.kv_heads * workload.model.head_dim
    if workload.compiled:
        return workload.element_bytes * (6 * dim + workload.qkv_width + keys + 3 * wide)
    norms = 2 * (4 + 2 * workload.element_bytes) * dim  # each norm saves its input in float32 and two results
    return norms + workload.element_bytes * (2 * dim + workload.qkv_width + keys + 4 * wide)


def _saved_probabilities(workload: Workload) -> int:
    """Return the bytes of attention probabilities per token, which only attention on the CPU saves."""
    probabilities = saved_attention_probabilities(workload.length) if workload.is_cpu else 0
    return workload.element_bytes * workload.model.heads * probabilities // workload.length


def _saved_for_backward(workload: Workload) -> dict[str, float]:
    """Return the components that exist when the backward pass begins, sharded weights excluded."""
    has_copies = workload.shards == 1 and workload.element_bytes == 2 and workload.activation_checkpointing == "none"
    gathered = workload.root_parameters + 2 * workload.block_parameters  # this block and the prefetched next block
    return {
        "activations": workload.model.layers * workload.tokens * activation_bytes_per_token(workload),
        "weight_copies": 2 * workload.model.layers * workload.block_parameters if has_copies else 0,
        "gathered": workload.element_bytes * gathered if workload.shards > 1 else 0,
    }


def _peak_at_loss(workload: Workload) -> dict[str, float]:
    """Return the temporary components during the loss: last norm's activations, head gradient, one chunk of logits."""
    head = (
        workload.tokens * (4 + 3 * workload.element_bytes) * workload.model.dim
        + 4 * workload.vocab_size * workload.model.dim
    )
    return _saved_for_backward(workload) | {"head": head, "logits": logits_bytes(workload)}


def _peak_in_backward(workload: Workload) -> dict[str, float]:
    """Return the temporary components in the last block's backward pass: recomputed activations and their gradients."""
    dim, wide, reduced = workload.model.dim, workload.model.ffn_dim, 0
    if workload.activation_checkpointing == "none":
        work = workload.element_bytes * (dim + 4 * wide)
    else:
        work = _block_activation_bytes(workload) + workload.element_bytes * (dim + 3 * wide)
        reduced = 4 * workload.block_parameters if workload.shards > 1 else 0
    if workload.activation_checkpointing == "selective":
        work -= activation_bytes_per_token(workload) - workload.element_bytes * 2 * dim
    head = 3 * workload.element_bytes * workload.tokens * dim
    return _saved_for_backward(workload) | {"head": head, "backward": workload.tokens * work, "reduce_scatter": reduced}


def _peak_at_gradient_reduction(workload: Workload) -> dict[str, float]:
    """Return the temporary components while the root's gradients are reduced; the activations are freed by then."""
    if workload.shards == 1:
        return {"head": 4 * workload.vocab_size * workload.model.dim}
    gathered = workload.element_bytes * workload.root_parameters
    return {"gathered": gathered, "reduce_scatter": (workload.element_bytes + 4) * workload.root_parameters}
