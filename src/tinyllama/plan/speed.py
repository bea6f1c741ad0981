"""Closed formulas for the network traffic of a training step and the time lost to failures.

The traffic per micro-batch follows from `distributed.py`. FSDP gathers each block for the forward pass and for the
backward pass, gathers the root once, and reduces gradients in float32. Replicas (HSDP) all-reduce their gradient
shards.
"""

import math
from dataclasses import dataclass

from tinyllama.hardware import GPUS_PER_NODE, HardwareSpec
from tinyllama.model.flops import num_parameters
from tinyllama.plan.memory import Workload

GPU_HOURS_BETWEEN_FAILURES = 50_676.0  # 54 x 24 x 16,384 / 419
"""Mean hours between failures of one GPU: 419 interruptions in 54 days on 16,384 H100s (arXiv:2407.21783, 3.3.4)."""

_LINK_STEP_SECONDS, _NETWORK_STEP_SECONDS = 3.4e-6, 14e-6
"""Latency per step of a ring or tree, over NVLink and between nodes (NCCL's src/graph/tuning.cc, hwLatencies)."""
_NEVER_FINISHES_EXPONENT = 50.0
"""Ratio of checkpoint interval to mean time between failures from which a run counts as never finishing."""


def shard_traffic_bytes(workload: Workload) -> float:
    """Return the bytes that a GPU receives from its shard group per micro-batch."""
    blocks = workload.model.layers * workload.block_parameters
    gathered = workload.element_bytes * (2 * blocks + workload.root_parameters)
    reduced = 4 * (blocks + workload.root_parameters)
    return (workload.shards - 1) / workload.shards * (gathered + reduced)


def replica_traffic_bytes(workload: Workload, replicas: int) -> float:
    """Return the bytes that a GPU receives from other replicas per micro-batch, in a ring all-reduce of its shard."""
    return 2 * (replicas - 1) / replicas * 4 * num_parameters(workload.model, workload.vocab_size) / workload.shards


def network_seconds(workload: Workload, replicas: int, spec: HardwareSpec) -> float:
    """Return the time of one micro-batch's traffic on idle links, in seconds, from bandwidth and latency.

    A collective within a node uses the node's links. A ring across nodes uses all ports of a node, so the ring has the
    bandwidth of a node (nccl-tests, PERFORMANCE.md, "bus bandwidth"). If a shard group fills a node, replicas are on
    other nodes.
    """
    link, network = spec.link_bytes_per_second, spec.network_bytes_per_second
    within_node = workload.shards <= GPUS_PER_NODE
    seconds = shard_traffic_bytes(workload) / (link if within_node else min(link, network))
    if replicas <= max(1, GPUS_PER_NODE // workload.shards):
        seconds += replica_traffic_bytes(workload, replicas) / link
    else:
        # number of GPUs per node that send their shards at the same time
        sharing_gpus = min(GPUS_PER_NODE, workload.shards)
        seconds += replica_traffic_bytes(workload, replicas) * sharing_gpus / network
    return seconds + _latency_seconds(workload, replicas)


def _latency_seconds(workload: Workload, replicas: int) -> float:
    """Return the latency of all collectives of a micro-batch, in seconds.

    A ring gathers each block twice and reduces its gradients once. A tree all-reduces the gradients of replicas.
    """
    nodes = -(-workload.shards // GPUS_PER_NODE)
    ring = (workload.shards - nodes) * _LINK_STEP_SECONDS + (nodes - 1) * _NETWORK_STEP_SECONDS
    within_node = workload.shards * replicas <= GPUS_PER_NODE
    tree = 2 * math.ceil(math.log2(replicas)) * (_LINK_STEP_SECONDS if within_node else _NETWORK_STEP_SECONDS)
    return (3 * workload.model.layers + 2) * ring + (workload.model.layers + 1) * tree


@dataclass(frozen=True)
class FailureOverhead:
    """Failures of a run and the wall-clock time that they cost."""

    expected_failures: float
    lost_hours: float
    """Time of repeated work, restarts and checkpoint stalls, at the recipe's interval."""
    best_interval_seconds: float
    lost_hours_at_best: float


def failure_overhead(
    run_hours: float, gpus: int, interval_seconds: float, stall_seconds: float, write_seconds: float,
    gpu_hours_between_failures: float, restart_seconds: float,
) -> FailureOverhead:  # fmt: skip
    """Return the expected overhead of a run that stalls `stall_seconds` for a checkpoint every `interval_seconds`.

    The formula for the run time with failures is from Daly (2006, doi:10.1016/j.future.2004.11.016, equation 13). The
    lost time is infinite if the run would never finish. The best interval is sqrt(2 x stall x time between failures)
    (Young 1974, doi:10.1145/361147.361115), but at least the time to write a checkpoint, and at most the duration of
    the run.
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

    return FailureOverhead(3600 * run_hours / between_seconds, lost_hours(interval_seconds), best, lost_hours(best))
