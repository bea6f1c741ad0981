"""Closed formulas for the memory and the network traffic of training, and for the time lost to failures.

The formulas describe the implementations in `model/`, `distributed.py` and FSDP2. The memory of one GPU is the sum of
all tensors at the peak. The peak occurs during the loss, in the last block's backward pass, while the root's gradients
are reduced, or in Muon's update. The sum includes the activations that each transformer block, eager or compiled, saves
for its backward pass. tests/plan/test_memory.py compares the sum with the result of torch's FSDP2 memory tracker. FSDP
gathers each block for the forward pass and for the backward pass. It gathers the root module (embedding, head and last
norm) once and reduces gradients in float32, in each micro-batch. If a step keeps its weights, FSDP gathers and reduces
once per step. Replicas (HSDP) all-reduce their gradient shards once per step.
"""

import math
from dataclasses import dataclass

from tinyllama.hardware import GPUS_PER_NODE, HardwareSpec
from tinyllama.model.flops import (
    CPU_SOFTMAX_CHUNK,
    MUON_BATCH_ELEMENTS,
    keeps_weights,
    loss_chunk_tokens,
    num_parameters,
    parameters_by_part,
    saved_attention_probabilities,
)
from tinyllama.recipe import ActivationCheckpointing, Model, Optimizer

GPU_HOURS_BETWEEN_FAILURES = 50_676.0  # 54 x 24 x 16,384 / 419
"""Mean hours between failures of one GPU: 419 interruptions in 54 days on 16,384 H100s (arXiv:2407.21783, 3.3.4)."""

_LINK_STEP_SECONDS, _NETWORK_STEP_SECONDS = 3.4e-6, 14e-6
"""Latency in seconds per step of a ring or tree, over NVLink and between nodes (NCCL's src/graph/tuning.cc,
hwLatencies)."""
_NEVER_FINISHES_EXPONENT = 50.0
"""Ratio of checkpoint interval to mean time between failures above which a run is assumed never to finish."""


@dataclass(frozen=True)
class Workload:
    """The work of one GPU: its model, micro-batch and shards."""

    model: Model
    vocab_size: int
    sequences: int
    """Number of sequences per micro-batch."""
    rank_sequences: int
    """Number of sequences of this GPU per step."""
    length: int
    """Number of tokens per sequence."""
    shards: int
    """Number of ranks among which the weights are sharded."""
    replicas: int
    """Number of groups of ranks that each have all shards."""
    device_memory_bytes: float
    """Memory of the GPU."""
    optimizer: Optimizer
    element_bytes: int = 2
    """Bytes per activation: 2 in bf16 and fp16, 4 in fp32."""
    activation_checkpointing: ActivationCheckpointing = "none"
    compiled: bool = True
    float8: bool = False
    """Whether torchao's linear layers multiply in float8; they take float32 weights, so only the head is copied."""
    is_cpu: bool = False
    copies_heads: bool = False
    """Whether attention copies keys and values for each query head; see `model.attention`."""

    @property
    def tokens(self) -> int:
        """Number of tokens per micro-batch."""
        return self.sequences * self.length

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches per step."""
        return self.rank_sequences // self.sequences

    @property
    def keeps_weights(self) -> bool:
        """Whether weights in the compute precision are kept over the micro-batches of a step."""
        parameters, is_sharded = num_parameters(self.model, self.vocab_size), self.shards * self.replicas > 1
        return keeps_weights(parameters, self.element_bytes, self.micro_batches, is_sharded, self.device_memory_bytes)

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
    def matrix_elements(self) -> int:
        """Number of elements of the blocks' matrices, which are all parameters of the blocks except the norms."""
        return self.model.layers * (self.block_parameters - 2 * self.model.dim)

    @property
    def qkv_width(self) -> int:
        """Total width of queries, keys and values."""
        return self.heads_width + 2 * self.model.kv_heads * self.model.head_dim

    @property
    def heads_width(self) -> int:
        """Total width of the query heads, and of the attention output."""
        return self.model.heads * self.model.head_dim


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
    peaks = [_peak_at_loss(workload), _peak_in_backward(workload), _peak_at_gradient_reduction(workload)]
    peaks += [{"muon": muon_bytes(workload)}] if workload.optimizer.name == "muon" else []
    highest = max((permanent | peak for peak in peaks), key=lambda components: sum(components.values()))
    return {name: round(count) for name, count in highest.items() if count}


def optimizer_bytes(workload: Workload) -> int:
    """Return the bytes of the float32 moments: two per parameter, or one for the matrices that Muon updates."""
    saved = 4 * workload.matrix_elements if workload.optimizer.name == "muon" else 0
    return 8 * num_parameters(workload.model, workload.vocab_size) - saved


def logits_bytes(workload: Workload) -> int:
    """Return the bytes of one chunk of the loss computation: logits, probabilities and the head's gradient."""
    chunk_tokens = min(loss_chunk_tokens(workload.vocab_size, workload.is_cpu), workload.tokens)
    logits = chunk_tokens * workload.vocab_size
    probabilities = min(logits, CPU_SOFTMAX_CHUNK) if workload.is_cpu else 2 * logits
    head = workload.vocab_size * workload.model.dim
    # unsharded float32 weights of the head are copied to bf16 or fp16 for the matrix product
    cast_head = 0 if workload.shards > 1 or workload.element_bytes == 4 or workload.keeps_weights else head
    return workload.element_bytes * (logits + head + cast_head) + 4 * probabilities


def muon_bytes(workload: Workload) -> float:
    """Return the bytes of Muon's temporary tensors: up to seven bf16 or fp32 copies of a rank's matrices in a batch."""
    largest = max(2 * workload.model.ffn_dim, workload.qkv_width) * workload.model.dim
    elements = max(min(MUON_BATCH_ELEMENTS, workload.matrix_elements / workload.shards), largest)
    return 7 * workload.element_bytes * elements


def activation_bytes_per_token(workload: Workload) -> int:
    """Return the bytes that one block saves per token for its backward pass."""
    dim, heads, wide = workload.model.dim, workload.heads_width, workload.model.ffn_dim
    match workload.activation_checkpointing:
        case "full":
            return workload.element_bytes * dim
        case "selective":
            products = (
                dim + heads + workload.qkv_width + 2 * wide + (0 if workload.compiled else dim)
            )  # eager mode also saves the output of the last matrix product
            return workload.element_bytes * (dim + products) + _saved_probabilities(workload)
        case "none":
            return _block_activation_bytes(workload) + _saved_probabilities(workload)


def _block_activation_bytes(workload: Workload) -> int:
    """Return the bytes per token that a block saves without checkpointing, except attention probabilities."""
    dim, heads, wide = workload.model.dim, workload.heads_width, workload.model.ffn_dim
    keys = workload.model.kv_heads * workload.model.head_dim
    attention = workload.qkv_width + 2 * heads + keys + (2 * (heads - keys) if workload.copies_heads else 0)
    if workload.compiled:
        return workload.element_bytes * (4 * dim + attention + 3 * wide)
    norms = 2 * (4 + 2 * workload.element_bytes) * dim  # each norm saves its input in float32 and two results
    return norms + workload.element_bytes * (attention + 4 * wide)


def _saved_probabilities(workload: Workload) -> int:
    """Return the bytes per token of saved attention probabilities; only attention on a CPU saves these."""
    probabilities = saved_attention_probabilities(workload.length) if workload.is_cpu else 0
    return workload.element_bytes * workload.model.heads * probabilities // workload.length


def _saved_for_backward(workload: Workload) -> dict[str, float]:
    """Return the bytes of the components that exist when the backward pass begins, without the sharded weights."""
    casts = workload.shards == 1 and workload.element_bytes == 2 and not workload.float8
    has_copies = casts and workload.activation_checkpointing == "none"
    activations = workload.model.layers * workload.tokens * activation_bytes_per_token(workload)
    if workload.keeps_weights:
        return {"activations": activations} | _kept_weights(workload)
    gathered = workload.root_parameters + 2 * workload.block_parameters  # this block and the prefetched next block
    return {
        "activations": activations,
        "weight_copies": 2 * workload.model.layers * workload.block_parameters if has_copies else 0,
        "gathered": workload.element_bytes * gathered if workload.shards > 1 else 0,
    }


def _kept_weights(workload: Workload) -> dict[str, float]:
    """Return the bytes of the weights that a step keeps over its micro-batches, and of their unsharded gradients."""
    if workload.shards > 1:
        parameters = num_parameters(workload.model, workload.vocab_size)
        return {"gathered": workload.element_bytes * parameters, "gradients": 4 * parameters}
    blocks = 0 if workload.float8 else workload.model.layers * workload.block_parameters
    head = workload.vocab_size * workload.model.dim
    return {"weight_copies": workload.element_bytes * (blocks + head)}


def _peak_at_loss(workload: Workload) -> dict[str, float]:
    """Return the bytes of temporary components during the loss: last norm's activations, head's gradient, logits."""
    head = (
        workload.tokens * (4 + 3 * workload.element_bytes) * workload.model.dim
        + 4 * workload.vocab_size * workload.model.dim
    )
    return _saved_for_backward(workload) | {"head": head, "logits": logits_bytes(workload)}


def _peak_in_backward(workload: Workload) -> dict[str, float]:
    """Return the bytes of temporary components in the last block's backward pass, such as recomputed activations."""
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
    """Return the bytes of temporary components while the root's gradients are reduced, after activations are freed."""
    if workload.shards == 1:
        copies = _kept_weights(workload) if workload.keeps_weights else {}
        return {"head": 4 * workload.vocab_size * workload.model.dim} | copies
    gathered = workload.element_bytes * workload.root_parameters
    gradient_bytes = 4 if workload.keeps_weights else workload.element_bytes  # before they are copied to be reduced
    return {"gathered": gathered, "reduce_scatter": (gradient_bytes + 4) * workload.root_parameters}


def traffic_bytes(workload: Workload, is_last: bool) -> float:
    """Return the bytes that a GPU receives in the last micro-batch of a step, or in each of those before it.

    If a step keeps its weights, all traffic of the step counts for the last micro-batch.
    """
    return _shard_traffic_bytes(workload, is_last) + _replica_traffic_bytes(workload, is_last)


def _shard_traffic_bytes(workload: Workload, is_last: bool) -> float:
    """Return the bytes that a GPU receives from its shard group in a micro-batch."""
    if workload.keeps_weights and not is_last:
        return 0.0
    blocks = workload.model.layers * workload.block_parameters
    gathered = workload.element_bytes * (blocks + workload.root_parameters)
    gathered_again = 0 if workload.keeps_weights else workload.element_bytes * blocks
    reduced = 4 * (blocks + workload.root_parameters)
    return (workload.shards - 1) / workload.shards * (gathered + gathered_again + reduced)


def _replica_traffic_bytes(workload: Workload, is_last: bool) -> float:
    """Return the bytes that a GPU receives from other replicas, in a ring all-reduce of its shard."""
    if not is_last:
        return 0.0
    parameters, replicas = num_parameters(workload.model, workload.vocab_size), workload.replicas
    return 2 * (replicas - 1) / replicas * 4 * parameters / workload.shards


def network_seconds(workload: Workload, spec: HardwareSpec, is_last: bool) -> float:
    """Return the time of a micro-batch's traffic on idle links, in seconds, from bandwidth and latency.

    `is_last` is true for the last micro-batch of a step; see `traffic_bytes`.

    A collective within a node uses the node's links. A ring across nodes uses all ports of a node, so the ring has the
    bandwidth of a node (nccl-tests, PERFORMANCE.md, "bus bandwidth"). If a shard group fills a node, replicas are on
    other nodes.
    """
    link, network = spec.link_bytes_per_second, spec.network_bytes_per_second
    within_node = workload.shards <= GPUS_PER_NODE
    seconds = _shard_traffic_bytes(workload, is_last) / (link if within_node else min(link, network))
    if workload.replicas <= max(1, GPUS_PER_NODE // workload.shards):
        seconds += _replica_traffic_bytes(workload, is_last) / link
    else:
        # number of GPUs per node that send their shards at the same time
        sharing_gpus = min(GPUS_PER_NODE, workload.shards)
        seconds += _replica_traffic_bytes(workload, is_last) * sharing_gpus / network
    return seconds + _latency_seconds(workload, is_last)


def _latency_seconds(workload: Workload, is_last: bool) -> float:
    """Return the latency of all collectives of a micro-batch, in seconds.

    A ring gathers each block twice (once if the step keeps its weights) and reduces its gradients once. A tree
    all-reduces the gradients of replicas in the last micro-batch.
    """
    if workload.keeps_weights and not is_last:
        return 0.0
    layers = workload.model.layers
    nodes = -(-workload.shards // GPUS_PER_NODE)
    ring = (workload.shards - nodes) * _LINK_STEP_SECONDS + (nodes - 1) * _NETWORK_STEP_SECONDS
    within_node = workload.shards * workload.replicas <= GPUS_PER_NODE
    tree = 2 * math.ceil(math.log2(workload.replicas)) * (_LINK_STEP_SECONDS if within_node else _NETWORK_STEP_SECONDS)
    rings = (2 if workload.keeps_weights else 3) * layers + 2
    return rings * ring + ((layers + 1) * tree if is_last else 0.0)


def failure_overhead(
    run_hours: float, gpus: int, interval_seconds: float, stall_seconds: float, write_seconds: float,
    gpu_hours_between_failures: float, restart_seconds: float,
) -> dict[str, float]:  # fmt: skip
    """Estimate the number of failures of a run, and the time that is lost to failures and checkpoints.

    A checkpoint is written every `interval_seconds`, and each stalls training for `stall_seconds`. `lost_hours` is the
    time spent on repeated work, restarts and checkpoint stalls. The run time with failures follows Daly (2006,
    doi:10.1016/j.future.2004.11.016, equation 13). This time is infinite if the run would never finish. The best
    interval is sqrt(2 x stall x time between failures) (Young 1974, doi:10.1145/361147.361115). It is limited to at
    least the time to write a checkpoint and at most the duration of the run.
    """
    between_seconds = 3600 * gpu_hours_between_failures / gpus
    best = max(math.sqrt(2 * stall_seconds * between_seconds), write_seconds)
    best = min(best, 3600 * run_hours)

    def lost_hours(interval: float) -> float:
        interval = min(interval, 3600 * run_hours)
        exponent = (interval + stall_seconds) / between_seconds
        if exponent + restart_seconds / between_seconds > _NEVER_FINISHES_EXPONENT:
            return math.inf
        ratio = between_seconds / interval * math.exp(restart_seconds / between_seconds) * math.expm1(exponent)
        return run_hours * (ratio - 1)

    return {
        "expected_failures": 3600 * run_hours / between_seconds,
        "lost_hours": lost_hours(interval_seconds),
        "best_checkpoint_seconds": best,
        "lost_hours_at_best": lost_hours(best),
    }
