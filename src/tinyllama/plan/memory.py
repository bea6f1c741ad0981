"""Memory that one GPU needs to train, by component, by closed formulas over what the network keeps.

The formulas follow `model/` and FSDP2: what a block saves for its backward pass, eager or compiled, and what exists at
the three moments that can be the peak. tests/plan/test_memory.py holds them against torch's FSDP2 memory tracker.

Letters: D model, Q the width of queries, keys and values together, K that of the keys, F feed-forward, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

from tinyllama.model.flops import (
    CPU_SOFTMAX_CHUNK,
    LOGITS_CHUNK,
    num_parameters,
    parameters_by_part,
    saved_attention_probabilities,
)
from tinyllama.recipe import Model
from tinyllama.recipe.train_schema import Optimizer

ActivationCheckpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Workload:
    """What one GPU holds and computes at a time."""

    shape: Model
    vocab_size: int
    sequences: int
    """Rows of a micro-batch."""
    length: int
    """Tokens a row."""
    shards: int
    """Ranks that hold the weights between them."""
    optimizer: Optimizer
    element_bytes: int = 2
    """Of an activation: 2 in bf16, 4 in fp32."""
    recompute: ActivationCheckpointing = "none"
    compiled: bool = True
    is_cpu: bool = False

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.sequences * self.length

    @property
    def root_parameters(self) -> int:
        """Embedding, head and last norm: what FSDP keeps gathered from the first use to the last."""
        parts = parameters_by_part(self.shape, self.vocab_size)
        return parts["embedding"] + parts["head"] + self.shape.dim

    @property
    def block_parameters(self) -> int:
        """Of one block."""
        return (num_parameters(self.shape, self.vocab_size) - self.root_parameters) // self.shape.layers


def memory_by_component(load: Workload) -> dict[str, int]:
    """Bytes of each component at the moment of the peak; their sum is what one GPU needs.

    `logits` and `backward` never exist together: only the larger of the two is there.
    """
    parameters = num_parameters(load.shape, load.vocab_size)
    lasting = {
        "weights": 4 * parameters // load.shards,
        "gradients": 4 * parameters // load.shards,
        "optimizer": optimizer_bytes(load) // load.shards,
    }
    passing = max(
        (_peak_at_loss(load), _peak_in_backward(load), _peak_at_gradient_reduction(load)), key=lambda m: sum(m.values())
    )
    return {name: round(count) for name, count in (lasting | passing).items() if count}


def optimizer_bytes(load: Workload) -> int:
    """Float32 moments: two a parameter by AdamW, one a matrix of the blocks by Muon."""
    matrices = load.shape.layers * (load.block_parameters - 2 * load.shape.dim)
    return 8 * num_parameters(load.shape, load.vocab_size) - (4 * matrices if load.optimizer.name == "muon" else 0)


def logits_bytes(load: Workload) -> int:
    """What the loss holds of one chunk: logits, probabilities, and the head's gradient in the activations' type."""
    logits = min(LOGITS_CHUNK, load.tokens * load.vocab_size)
    probabilities = min(logits, CPU_SOFTMAX_CHUNK) if load.is_cpu else 2 * logits
    head = load.vocab_size * load.shape.dim
    copy = 0 if load.shards > 1 or load.element_bytes == 4 else head  # of a float32 head, cast for the product
    return load.element_bytes * (logits + head + copy) + 4 * probabilities


def activation_bytes_per_token(load: Workload) -> int:
    """What one block keeps of one token for its backward pass."""
    dim, queries, _, wide = _widths(load)
    if load.recompute == "full":
        return load.element_bytes * dim
    if load.recompute == "selective":
        results = 2 * dim + queries + 2 * wide + (0 if load.compiled else dim)  # eager keeps the last product too
        return load.element_bytes * (dim + results) + _kept_probabilities(load)
    return _block_activation_bytes(load) + _kept_probabilities(load)


def _block_activation_bytes(load: Workload) -> int:
    dim, queries, keys, wide = _widths(load)
    if load.compiled:
        return load.element_bytes * (6 * dim + queries + keys + 3 * wide)
    norms = 2 * (4 + 2 * load.element_bytes) * dim  # each keeps its input in float32, and two of its results
    return norms + load.element_bytes * (2 * dim + queries + keys + 4 * wide)


def _widths(load: Workload) -> tuple[int, int, int, int]:
    """D, Q, K, F."""
    shape = load.shape
    return (
        shape.dim,
        (shape.heads + 2 * shape.kv_heads) * shape.head_dim,
        shape.kv_heads * shape.head_dim,
        shape.ffn_dim,
    )


def _kept_probabilities(load: Workload) -> int:
    if not load.is_cpu:
        return 0
    return load.element_bytes * load.shape.heads * saved_attention_probabilities(load.length) // load.length


def _saved_for_backward(load: Workload) -> dict[str, float]:
    """What the backward pass still needs when it begins, weights aside."""
    copies = load.shards == 1 and load.element_bytes == 2 and load.recompute == "none"
    gathered = load.root_parameters + 2 * load.block_parameters  # this block and the next, which is fetched ahead
    return {
        "activations": load.shape.layers * load.tokens * activation_bytes_per_token(load),
        "weight_copies": 2 * load.shape.layers * load.block_parameters if copies else 0,
        "gathered": load.element_bytes * gathered if load.shards > 1 else 0,
    }


def _peak_at_loss(load: Workload) -> dict[str, float]:
    """The last norm's activations, the head's gradient, one chunk of logits."""
    head = load.tokens * (4 + 3 * load.element_bytes) * load.shape.dim + 4 * load.vocab_size * load.shape.dim
    return _saved_for_backward(load) | {"head": head, "logits": logits_bytes(load)}


def _peak_in_backward(load: Workload) -> dict[str, float]:
    """What a block computes again, and the gradients of its activations."""
    dim, _, _, wide = _widths(load)
    head = 3 * load.element_bytes * load.tokens * dim
    if load.recompute == "none":
        work = load.element_bytes * (dim + 4 * wide)
        return _saved_for_backward(load) | {"head": head, "backward": load.tokens * work}
    work = _block_activation_bytes(load) + load.element_bytes * (dim + 3 * wide)
    if load.recompute == "selective":
        work -= activation_bytes_per_token(load) - load.element_bytes * 2 * dim
    reduced = 4 * load.block_parameters if load.shards > 1 else 0
    return _saved_for_backward(load) | {"head": head, "backward": load.tokens * work, "reduce_scatter": reduced}


def _peak_at_gradient_reduction(load: Workload) -> dict[str, float]:
    """The embedding's and the head's gradients on their way into the shards; the blocks' activations are gone."""
    whole = 4 * load.vocab_size * load.shape.dim
    gathered = load.element_bytes * load.root_parameters
    if load.shards == 1:
        return {"head": whole}
    return {"gathered": gathered, "reduce_scatter": (load.element_bytes + 4) * load.root_parameters}
