"""Memory that one GPU needs to train, per component, by closed formulas.

The formulas follow `model/` and FSDP2: what a block saves for its backward pass, eager or compiled, and what exists at
the three moments that can be the peak. tests/plan/test_memory.py compares them with torch's FSDP2 memory tracker.
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
    """What one GPU holds, and computes at a time."""

    shape: Model
    vocab_size: int
    sequences: int
    """Sequences of a micro-batch."""
    length: int
    """Tokens per sequence."""
    shards: int
    """Ranks among which the weights are sharded."""
    optimizer: Optimizer
    element_bytes: int = 2
    """Bytes per activation: 2 in bf16, 4 in fp32."""
    activation_checkpointing: ActivationCheckpointing = "none"
    compiled: bool = True
    is_cpu: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequences * self.length

    @property
    def root_parameters(self) -> int:
        """Parameters of embedding, head and last norm, which FSDP keeps gathered from first to last use."""
        parts = parameters_by_part(self.shape, self.vocab_size)
        return parts["embedding"] + parts["head"] + self.shape.dim

    @property
    def block_parameters(self) -> int:
        """Parameters of one block."""
        return (num_parameters(self.shape, self.vocab_size) - self.root_parameters) // self.shape.layers

    @property
    def qkv_width(self) -> int:
        """Width of queries, keys and values together."""
        return (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim


def memory_by_component(load: Workload) -> dict[str, int]:
    """Return the bytes of each component at the peak; their sum is what one GPU needs.

    `logits` and `backward` never exist at the same time: only the larger is included.
    """
    parameters = num_parameters(load.shape, load.vocab_size)
    permanent = {
        "weights": 4 * parameters // load.shards,
        "gradients": 4 * parameters // load.shards,
        "optimizer": optimizer_bytes(load) // load.shards,
    }
    peaks = (_peak_at_loss(load), _peak_in_backward(load), _peak_at_gradient_reduction(load))
    temporary = max(peaks, key=lambda components: sum(components.values()))
    return {name: round(count) for name, count in (permanent | temporary).items() if count}


def optimizer_bytes(load: Workload) -> int:
    """Return the bytes of the float32 moments: two per parameter, or one for the matrices that Muon updates."""
    matrices = load.shape.layers * (load.block_parameters - 2 * load.shape.dim)
    return 8 * num_parameters(load.shape, load.vocab_size) - (4 * matrices if load.optimizer.name == "muon" else 0)


def logits_bytes(load: Workload) -> int:
    """Return the bytes of one chunk of the loss: logits, probabilities and the head's gradient."""
    logits = min(LOGITS_CHUNK, load.tokens * load.vocab_size)
    probabilities = min(logits, CPU_SOFTMAX_CHUNK) if load.is_cpu else 2 * logits
    head = load.vocab_size * load.shape.dim
    cast_head = 0 if load.shards > 1 or load.element_bytes == 4 else head  # of float32 weights, for the product
    return load.element_bytes * (logits + head + cast_head) + 4 * probabilities


def activation_bytes_per_token(load: Workload) -> int:
    """Return the bytes that one block saves per token for its backward pass."""
    dim, wide = load.shape.dim, load.shape.ffn_dim
    match load.activation_checkpointing:
        case "full":
            return load.element_bytes * dim
        case "selective":
            products = 2 * dim + load.qkv_width + 2 * wide + (0 if load.compiled else dim)  # eager saves the last too
            return load.element_bytes * (dim + products) + _saved_probabilities(load)
        case "none":
            return _block_activation_bytes(load) + _saved_probabilities(load)


def _block_activation_bytes(load: Workload) -> int:
    """Return the bytes per token that a block saves without activation checkpointing, probabilities excluded."""
    dim, wide, keys = load.shape.dim, load.shape.ffn_dim, load.shape.kv_heads * load.shape.head_dim
    if load.compiled:
        return load.element_bytes * (6 * dim + load.qkv_width + keys + 3 * wide)
    norms = 2 * (4 + 2 * load.element_bytes) * dim  # each saves its input in float32 and two results
    return norms + load.element_bytes * (2 * dim + load.qkv_width + keys + 4 * wide)


def _saved_probabilities(load: Workload) -> int:
    """Return the bytes of attention probabilities per token, which only the CPU's attention saves."""
    probabilities = saved_attention_probabilities(load.length) if load.is_cpu else 0
    return load.element_bytes * load.shape.heads * probabilities // load.length


def _saved_for_backward(load: Workload) -> dict[str, float]:
    """Return what exists when the backward pass begins, sharded weights excluded."""
    has_copies = load.shards == 1 and load.element_bytes == 2 and load.activation_checkpointing == "none"
    gathered = load.root_parameters + 2 * load.block_parameters  # this block and the next, which is prefetched
    return {
        "activations": load.shape.layers * load.tokens * activation_bytes_per_token(load),
        "weight_copies": 2 * load.shape.layers * load.block_parameters if has_copies else 0,
        "gathered": load.element_bytes * gathered if load.shards > 1 else 0,
    }


def _peak_at_loss(load: Workload) -> dict[str, float]:
    """Return the temporary components at the loss: last norm's activations, head's gradient, one chunk of logits."""
    head = load.tokens * (4 + 3 * load.element_bytes) * load.shape.dim + 4 * load.vocab_size * load.shape.dim
    return _saved_for_backward(load) | {"head": head, "logits": logits_bytes(load)}


def _peak_in_backward(load: Workload) -> dict[str, float]:
    """Return the temporary components in the last block's backward pass: recomputed activations and their gradients."""
    dim, wide, reduced = load.shape.dim, load.shape.ffn_dim, 0
    if load.activation_checkpointing == "none":
        work = load.element_bytes * (dim + 4 * wide)
    else:
        work = _block_activation_bytes(load) + load.element_bytes * (dim + 3 * wide)
        reduced = 4 * load.block_parameters if load.shards > 1 else 0
    if load.activation_checkpointing == "selective":
        work -= activation_bytes_per_token(load) - load.element_bytes * 2 * dim
    head = 3 * load.element_bytes * load.tokens * dim
    return _saved_for_backward(load) | {"head": head, "backward": load.tokens * work, "reduce_scatter": reduced}


def _peak_at_gradient_reduction(load: Workload) -> dict[str, float]:
    """Return the temporary components while the root's gradients are reduced; the activations are freed by then."""
    if load.shards == 1:
        return {"head": 4 * load.vocab_size * load.shape.dim}
    gathered = load.element_bytes * load.root_parameters
    return {"gathered": gathered, "reduce_scatter": (load.element_bytes + 4) * load.root_parameters}
